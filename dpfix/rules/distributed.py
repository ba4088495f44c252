"""Models wrapped for several processes or devices.

What: ``DistributedDataParallel`` (torch's or Opacus's), fully sharded modules, and ``DataParallel`` over several devices.

Why: with several ranks the sampling rate, the noise per rank and the reduction of the clipped sums have to be arranged
together, and the proofs have to hold on every rank. dpfix does not do that yet and does not pretend to.

Example: ``model = DistributedDataParallel(model)``.

Use instead: train the model on one device; for several, Opacus's ``DifferentiallyPrivateDistributedDataParallel`` with its
own ``PrivacyEngine``.

Fix safety: not fixed; refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dpfix.errors import ModelError
from dpfix.findings import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan import Scan

CODE = "DPF019"
TITLE = "a model wrapped for several processes or devices"
ERROR = ModelError

_WRAPPERS = (
    DistributedDataParallel,
    DifferentiallyPrivateDistributedDataParallel,
    FullyShardedDataParallel,
    FSDPModule,
)


def find(scan: Scan) -> Iterator[Finding]:
    """The outermost wrapper for several processes or devices.

    Args:
        scan: the objects of the call.

    Yields:
        At most one finding, refused.
    """
    for path, module in scan.modules():
        several = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
        if not (several or isinstance(module, _WRAPPERS)):
            continue
        yield Finding(
            code=CODE,
            severity=Severity.BREAKS_GUARANTEE,
            fixability=Fixability.REFUSED,
            fact=f"module: {type(module).__name__} at `{path or 'the root module'}` spreads the model over devices.",
            why="sampling, noise and the sum of the ranks have to be arranged together; dpfix does not do that yet.",
            help="pass the module inside it and train on one device, or use Opacus's PrivacyEngine with "
            "DifferentiallyPrivateDistributedDataParallel.",
            path=path,
        )
        return


VALID = (
    lambda: {"module": nn.Sequential(nn.Linear(6, 3))},
    lambda: {"module": nn.DataParallel(nn.Sequential(nn.Linear(6, 3)))},
)
INVALID: tuple = ()
"""The wrappers need a process group; the test for this rule starts one itself."""
