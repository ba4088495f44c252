"""Who loads checkpoints of monai-generative 0.2.3 correctly: MONAI's own loader, and dpfix.

``python -m benchmarks.legacy_weights [--only TEXT] [--write docs/weights.md]``

Every row is a network with weights drawn from a seed, whose outputs were recorded from monai-generative 0.2.3 itself
(``python -m tests.weights.record_legacy``). Both load these weights into the network of the installed MONAI; the figure is the
largest absolute difference from the recorded outputs, over ``encode``, ``decode`` and ``forward`` where there are several.
MONAI's loader is ``load_old_state_dict``, and ``load_state_dict`` for networks that have none.

The exit status is 1 if dpfix is off by more than 1e-6 anywhere, or loads what cannot be converted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import monai
from monai.networks import nets
from torch import Tensor, nn

import dpfix
from benchmarks.common import tables
from benchmarks.common.process import quiet
from dpfix.weights import compare_outputs
from tests.weights.legacy_zoo import REFUSED, ZOO, Legacy
from tests.weights.record_legacy import load

MOST = 1e-6
Loader = Callable[[nn.Module, dict[str, Tensor]], object]


def with_monai(model: nn.Module, weights: dict[str, Tensor]) -> object:
    """MONAI's own loader, if the network has one."""
    own = getattr(model, "load_old_state_dict", None)
    return model.load_state_dict(weights) if own is None else own(weights)


def with_dpfix(model: nn.Module, weights: dict[str, Tensor]) -> object:
    """dpfix's loader."""
    return dpfix.load_pretrained(model, weights)


def difference(case: Legacy, load_into: Loader) -> tuple[float, bool]:
    """Largest difference from the recorded outputs, and whether the given mapping is as it was."""
    weights, outputs = load(case)
    model, given = case.build_new(nets), dict(weights)
    with contextlib.redirect_stdout(io.StringIO()):
        load_into(model, given)
    # Networks with nothing recorded (0.2.3 fails in its own forward) cannot agree.
    found = [compare_outputs(t, case.run(model, method)) for method, t in outputs.items() if t]
    return max(found, default=float("inf")), given.keys() == weights.keys()


def told(case: Legacy, load_into: Loader) -> tuple[str, bool]:
    """A cell of the table, and whether it is right: equal where that is possible, refused where it is not."""
    try:
        size, kept = difference(case, load_into)
    except dpfix.NotConvertibleError:
        return "refused: `NotConvertibleError`", case in REFUSED
    except Exception as error:  # noqa: BLE001  # what another package's loader raises is what is shown
        return f"stops: `{type(error).__name__}`", False
    emptied = "" if kept else ", empties the given dict"
    if size <= MOST:
        return f"right: {size:.0e}{emptied}", case not in REFUSED
    return f"**wrong**: {size:.2g}{emptied}", False


def rows(only: str) -> tuple[list[str], bool]:
    """The table, and whether dpfix is right everywhere."""
    lines = tables.head("network", f"MONAI {monai.__version__}", "dpfix")
    right = True
    for case in (*ZOO, *REFUSED):
        if only.lower() not in case.name.lower():
            continue
        theirs, (ours, good) = told(case, with_monai)[0], told(case, with_dpfix)
        right &= good
        lines.append(tables.row(case.name.strip(), theirs, ours))
    return lines, right


def main() -> int:
    """Print the table, and write it into a page if asked to.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--write", type=Path, help="page in which the table stands")
    arguments = parser.parse_args()
    quiet()
    lines, right = rows(arguments.only)
    print("\n".join(lines))
    if arguments.write is not None:
        tables.write(arguments.write, lines)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
