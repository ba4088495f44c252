from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from dpfix.errors import ModelError
from dpfix.instrument.sharded import is_sharded
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.sampling.ranks import TakenOver, forget_forward, in_default_group
from dpfix.scan.scan import Scan

_SUMMED = "it adds up the gradients of the ranks while backward runs, before they are clipped."
_SHARDED = "no process holds a whole parameter, and dpfix's proofs and engines need one that does."
_FSDP2 = (
    "call torch.distributed.fsdp.fully_shard on the whole model too, after its parts, before make_private_safe; or "
)
_BEFORE = "look at the model before fully_shard is called on it; make_private_safe takes it afterwards."
_INSTEAD = (
    "wrap the whole model with torch.nn.parallel.DistributedDataParallel, or with Opacus's "
    "DifferentiallyPrivateDistributedDataParallel, and make the same call on every rank."
)
_TAKEN_OVER = (
    "the object is now Opacus's DifferentiallyPrivateDistributedDataParallel around the same model. Nothing is exchanged during "
    "backward; optimizer.step() adds up the clipped sums of the ranks, once per batch."
)


class Distributed(Rule):
    """Models wrapped for several processes or devices, in a way that sums gradients before they are clipped.

    What: torch's ``DistributedDataParallel``, fully sharded modules (``fully_shard`` on the whole model is not one of them in
    ``make_private_safe``), ``DataParallel`` over several devices, and Opacus's
    ``DifferentiallyPrivateDistributedDataParallel`` anywhere but around the whole model.

    Why bad: torch's wrappers average gradients over the ranks while ``backward`` runs, before any sample's gradient was
    clipped. Fully sharded parameters are in no process as a whole.

    Example: ``model = DistributedDataParallel(model)`` around the whole model is taken over: the clipped sums of the ranks
    are added up instead. Around a part of it, it is refused.

    Use instead: a wrapper around the whole model, with the same call on every rank.
    """

    title = "a model wrapped for several processes or devices"
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.EXACT: "torch's ``DistributedDataParallel`` around the whole model, over all processes. The object becomes "
        "Opacus's wrapper of the same model, whether the loop calls it or the returned model.",
        Fixability.REFUSED: "all others.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        whole = scan.module
        if isinstance(whole, DistributedDataParallel) and not _problem("", whole)[0]:
            fact = f"module: {type(whole).__name__} averages the gradients of the ranks."
            yield self.finding(Fixability.EXACT, fact, _SUMMED, fix=_TAKEN_OVER)
        spread = [] if is_sharded(whole) else [n for n, p in whole.named_parameters() if isinstance(p, DTensor)]
        if spread and not any(is_sharded(module) for module in whole.modules()):
            yield self.refusal(
                f"parameter `{spread[0]}` of {type(whole).__name__} is a DTensor ({len(spread)} such parameter(s)).",
                _SHARDED,
                _INSTEAD,
                spread[0],
            )
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

    @override
    def fix(self, module: nn.Module, scan: Scan) -> Mapping[str, Any]:
        forget_forward(module)
        return {"__class__": TakenOver}

    VALID = (
        lambda: {"module": nn.Sequential(nn.Linear(6, 3))},
        lambda: {"module": nn.DataParallel(nn.Sequential(nn.Linear(6, 3)))},
    )
    remark = "The wrappers need a process group; the test for this rule starts one itself."


def refuse_flat(module: nn.Module) -> None:
    """Refuse a model in FSDP1 before anything of it is read: the memory behind its parameters is freed between calls.

    Args:
        module: a model.

    Raises:
        ModelError: there is such a wrapper.
    """
    for path, child in module.named_modules():
        if isinstance(child, FullyShardedDataParallel):
            fact = f"module: {type(child).__name__} at `{path or 'the root module'}` spreads the model over devices."
            raise ModelError(Finding.refusal("DPF019", fact, *_problem(path, child), path=path))


def _problem(path: str, module: nn.Module) -> tuple[str, str]:
    if isinstance(module, DifferentiallyPrivateDistributedDataParallel):
        if path:
            return "its ranks would share a part of the model only.", "wrap the whole model with it."
        if not distributed.is_initialized():
            return (
                "there is no process group, so the ranks cannot be added up.",
                "call torch.distributed.init_process_group() first, or pass the module inside it.",
            )
    if isinstance(module, FSDPModule):
        return _SHARDED, _FSDP2 + _INSTEAD if path else _BEFORE
    if isinstance(module, FullyShardedDataParallel):
        return _SHARDED, f"use torch.distributed.fsdp.fully_shard (accelerate: fsdp_version=2); or {_INSTEAD}"
    if isinstance(module, DistributedDataParallel):
        return _problem_of_torch(path, module)
    several = isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
    return (_SUMMED, _INSTEAD) if several else ("", "")


def _problem_of_torch(path: str, module: DistributedDataParallel) -> tuple[str, str]:
    if path:
        return _SUMMED, _INSTEAD
    if not in_default_group(module):
        return (
            "its processes are not those of the default process group, in which clipped sums are added up.",
            "leave process_group and device_mesh out of DistributedDataParallel(...).",
        )
    if vars(module).get("mixed_precision") is not None:
        return (
            "with mixed_precision it computes with copies of the parameters, whose gradients do not belong to samples.",
            "leave mixed_precision out, and run the model under torch.autocast.",
        )
    if vars(module).get("_delay_all_reduce_params"):
        return (
            "with delay_all_reduce_named_params it exchanges gradients in hooks of the parameters' own.",
            "leave delay_all_reduce_named_params and param_to_hook_all_reduce out.",
        )
    return "", ""
