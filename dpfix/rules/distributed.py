from __future__ import annotations

from collections.abc import Iterator

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan

_SUMMED = "it adds up the gradients of the ranks while backward runs, before they are clipped."
_SHARDED = "no process holds a whole parameter, and dpfix's proofs and engines need one that does."
_INSTEAD = (
    "wrap the module inside it with opacus.distributed.DifferentiallyPrivateDistributedDataParallel, and make the same call "
    "on every rank."
)


class Distributed(Rule):
    """Models wrapped for several processes or devices, in a way that sums gradients before they are clipped.

    What: torch's ``DistributedDataParallel``, fully sharded modules, ``DataParallel`` over several devices, and Opacus's
    ``DifferentiallyPrivateDistributedDataParallel`` anywhere but around the whole model.

    Why bad: torch's wrappers average gradients over the ranks while ``backward`` runs, before any sample's gradient was
    clipped. Fully sharded parameters are in no process as a whole.

    Example: ``model = DistributedDataParallel(model)``.

    Use instead: ``model = DifferentiallyPrivateDistributedDataParallel(model)`` from ``opacus.distributed``, with the same
    call on every rank: the clipped sums of the ranks are added up.
    """

    title = "a model wrapped for several processes or devices"
    severity = Severity.BREAKS_GUARANTEE

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, module in scan.modules():
            why, help = _problem(path, module)
            if not why:
                continue
            yield self.refusal(
                f"module: {type(module).__name__} at `{path or 'the root module'}` spreads the model over devices.",
                why,
                help,
                path,
            )
            return  # the outermost one

    VALID = (
        lambda: {"module": nn.Sequential(nn.Linear(6, 3))},
        lambda: {"module": nn.DataParallel(nn.Sequential(nn.Linear(6, 3)))},
    )
    remark = "The wrappers need a process group; the test for this rule starts one itself."


def _problem(path: str, module: nn.Module) -> tuple[str, str]:
    if isinstance(module, DifferentiallyPrivateDistributedDataParallel):
        if path:
            return "its ranks would share a part of the model only.", "wrap the whole model with it."
        if not distributed.is_initialized():
            return (
                "there is no process group, so the ranks cannot be added up.",
                "call torch.distributed.init_process_group() first, or pass the module inside it.",
            )
    if isinstance(module, (FullyShardedDataParallel, FSDPModule)):
        return _SHARDED, _INSTEAD
    several = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
    return (_SUMMED, _INSTEAD) if several or isinstance(module, DistributedDataParallel) else ("", "")
