"""Whether a model that torch's ``fully_shard`` (FSDP2) has spread over processes can be trained as it is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard

from dpfix.engines import BY_NAME, FOR_SHARDS
from dpfix.errors import ArgumentError, ModelError
from dpfix.report.finding import Finding
from dpfix.scan.request import Request


def check_shards(request: Request) -> None:
    """Refuse what cannot be done with parameters that are spread over processes.

    Raises:
        ModelError: of the model.
        ArgumentError: of the arguments.
    """
    for problem in _problems(request.module):
        raise ModelError(problem)
    performance, privacy = request.performance, request.privacy
    mode, most = performance.grad_sample_mode, performance.max_physical_batch_size
    if mode in BY_NAME and not BY_NAME[mode].takes_shards:
        raise ArgumentError(
            f"grad_sample_mode={mode!r} with a model on which fully_shard was called:",
            f"only the engine {FOR_SHARDS!r} needs no more than one whole layer at a time.",
            "Leave grad_sample_mode out, or wrap the model with DistributedDataParallel instead.",
            path="grad_sample_mode",
        )
    if most is not None:
        raise ArgumentError(
            f"max_physical_batch_size={most!r} with a model on which fully_shard was called:",
            "the ranks put layers together at the same calls of the model, and would have different numbers of parts.",
            "Leave it out; more ranks, or torch.utils.checkpoint in the model, save memory.",
            path="max_physical_batch_size",
        )
    if privacy.noise_generator is not None:
        raise ArgumentError(
            "noise_generator= with a model on which fully_shard was called:",
            "every rank adds noise to its own part of the parameters, and generators with one seed would add the same to each.",
            "Leave it out, or pass seed= for an experiment that is to be repeated.",
            path="noise_generator",
        )


def _problems(module: nn.Module) -> Iterator[Finding]:
    for name, p in module.named_parameters():
        if not isinstance(p, DTensor):
            if p.requires_grad:
                yield _refusal(
                    name,
                    "is on every rank as a whole, while other parameters are spread over the ranks by fully_shard",
                    "Its noise would have to be the same on all ranks, and theirs different.",
                    "Leave ignored_params out of fully_shard, or freeze the parameter before.",
                )
            continue
        mesh, shard = p.device_mesh, p.to_local()
        if mesh.ndim != 1 or not isinstance(p.placements[0], Shard):
            yield _refusal(
                name,
                f"is placed as {p.placements} on a mesh of shape {tuple(mesh.shape)}",
                "Parts that several ranks hold (HSDP, tensor parallelism) would get different noise on each.",
                "Call fully_shard with a mesh of one dimension over all ranks, without tensor parallelism.",
            )
        elif mesh.size() != distributed.get_world_size():
            yield _refusal(
                name,
                f"is spread over {mesh.size()} of {distributed.get_world_size()} ranks",
                "The batches are shared out among all ranks.",
                "Call fully_shard with a mesh over all ranks.",
            )
        elif shard.is_meta:
            yield _refusal(
                name,
                "has no values yet (device meta)",
                "The step is checked with the values that the training begins with.",
                "Call model.to_empty(device=...) and initialise or load the weights before make_private_safe.",
            )
        elif shard.device.type != mesh.device_type:
            yield _refusal(
                name,
                f"is kept on {shard.device.type}, and computed with on {mesh.device_type} (CPUOffloadPolicy)",
                "Clipped sums and noise are made where the ranks exchange them.",
                "Leave offload_policy out of fully_shard.",
            )


def _refusal(name: str, what: str, why: str, help: str) -> Finding:
    return Finding.refusal("DPF053", f"parameter `{name}` {what}.", why, help, path=name)
