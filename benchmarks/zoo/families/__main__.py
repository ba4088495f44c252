"""Public families beside MONAI: transformers, PEFT, timm, torchvision, and kinds of models written in plain torch.

``python -m benchmarks.zoo.families [--of NAME] [--only TEXT] [--timeout SECONDS] [--write]``

Each network is trained with noise on Poisson draws, with an empty one and one of a single sample among them, with the loss
it is made for. Then the sum that is released without noise is compared with clipped gradients taken one sample at a time
with ordinary autograd, as ``python -m benchmarks.zoo`` does. The packages are those of ``requirements-zoo.txt``. The exit
status is 1 if a network is wrong, or refused without the reason noted for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from benchmarks.zoo.families.page import KINDS, by_sample, lines, summary, write
from benchmarks.zoo.measure import Row
from benchmarks.zoo.run import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="", choices=["", *KINDS], help="one kind of networks; all if not given")
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per network")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results and docs/families.md")
    arguments = parser.parse_args()
    failed = False
    for kind in [arguments.of] if arguments.of else KINDS:
        done: Callable[[Row], None] = (
            (lambda row, kind=kind: write(kind, [row])) if arguments.write else lambda row: None
        )
        rows = run(f"benchmarks.zoo.families.{kind}", arguments.only, 1, arguments.timeout, opacus=False, done=done)
        print("\n".join(lines(rows)), summary(rows), "\n".join(by_sample(rows)), sep="\n\n", flush=True)
        failed |= not all(row.expected for row in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
