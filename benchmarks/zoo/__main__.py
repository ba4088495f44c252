"""Every trainable network of ``monai.networks.nets``: what plain Opacus does with it, and what dpfix does.

``python -m benchmarks.zoo [--only TEXT] [--jobs N] [--timeout SECONDS] [--write]``

Each network of :mod:`benchmarks.zoo.networks` is trained by both, with noise, on three Poisson draws, with the loss it is made
for. Plain Opacus gets the model after ``ModuleValidator.fix``. Then, for both:

* *error*: distance of the sum that is released without noise from the sum of clipped gradients taken one sample at a time
  with ordinary autograd; per parameter, relative to its norm; of several samples at two clip norms, and of one. Layers that
  start at zero are filled, dropout is off, and random numbers drawn in ``forward`` are the same for every sample.
* an empty Poisson draw, and one of a single sample.

Time is that of a whole step (forward, backward, ``optimizer.step()`` with noise) over the same without privacy, on the same
batches, taking turns. The exit status is 1 if dpfix gets a network wrong, or refuses one without the reason noted for it.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.zoo.run import run
from benchmarks.zoo.table import by_sample, lines, summary, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per network")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/zoo.json and docs/zoo.md")
    arguments = parser.parse_args()
    rows = run("benchmarks.zoo.networks", arguments.only, arguments.jobs, arguments.timeout)
    print("\n".join(lines(rows)), summary(rows), "\n".join(by_sample(rows)), sep="\n\n")
    if arguments.write:
        write(rows)
    return int(not all(row.expected for row in rows))


if __name__ == "__main__":
    sys.exit(main())
