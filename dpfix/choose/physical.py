"""How many samples are in memory at a time: a batch is delivered in parts, and released once, as a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpfix.engines import engine_of
from dpfix.engines.no_grad_regions import applied
from dpfix.engines.saved_bytes import saved_bytes
from dpfix.errors import ArgumentError
from dpfix.instrument.module_state import state_of, traceless
from dpfix.observe.probe import Probe
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.sampling.rate import index_set
from dpfix.scan.request import Request

OF_FREE = 0.5
"""How much of the free memory the samples of a physical batch may take: the estimate knows no kernel's own memory."""
PER_PARAMETER = 4
"""What a training holds besides the weights: gradient, clipped sum, and two states of an optimizer such as Adam."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def with_physical(request: Request, subject: Subject, samples: Probe, plan: Plan) -> Plan:
    """The plan with the number of samples in a physical batch, the same on all ranks.

    Args:
        request: the call, which says a number, or that it is to be found.
        subject: the model and its step.
        samples: of which batches are made to measure a step.
        plan: with its engine.

    Returns:
        The plan; as it was where the loader has been made already.
    """
    asked = request.performance.max_physical_batch_size
    if asked != "auto" or request.handed_over:
        return replace(plan, physical=None if asked == "auto" else asked)
    parameters = list(subject.trained().values())
    device = parameters[0].device
    left = free_memory(device, request.ranks.size) - PER_PARAMETER * _bytes(parameters)
    fitting = int(max(left, 0) * OF_FREE / bytes_of_sample(subject, samples, plan))
    most = min(request.ranks.exchange(max(1, fitting)))
    return replace(plan, physical=min(most, len(index_set(request.data_loader))), halves=True)


def told_physical(request: Request) -> int | None:
    """The number that the call says, where no step is known that could be measured.

    Returns:
        The number; ``None`` for whole batches.

    Raises:
        ArgumentError: it is to be found.
    """
    asked = request.performance.max_physical_batch_size
    if asked != "auto":
        return asked
    raise ArgumentError(
        "max_physical_batch_size='auto' for a model of which one batch does not tell how the loop calls it:",
        "the memory of a step can only be measured on a step that is known.",
        "Pass training_step=, or a number of samples.",
        path="max_physical_batch_size",
    )


def bytes_of_sample(subject: Subject, samples: Probe, plan: Plan) -> float:
    """About how much memory a step takes for each of its samples.

    What autograd keeps of a sample, once more for the gradients of it, and per-sample gradients: of all parameters where the
    engine keeps them, of the largest one where it uses them up.

    Args:
        subject: the model and its step.
        samples: of which batches of two and of four are made.
        plan: with its engine.

    Returns:
        Bytes.
    """
    few, many = (_kept(subject, samples.of_size(size), plan) for size in (2, 4))
    each = max((many - few) / 2, many / 8)
    parameters = list(subject.trained().values())
    gradients = _bytes(parameters) if engine_of(plan).materialises else max(_bytes([p]) for p in parameters)
    return 2 * each + gradients


def _kept(subject: Subject, batch: Any, plan: Plan) -> int:
    module = subject.module
    with traceless(module, state_of(module)), applied(module, plan.no_grad_regions):
        with saved_bytes(module.parameters()) as seen:
            subject.step.loss(module, batch)
        return sum(seen.values())


def _bytes(parameters: Sequence[torch.Tensor]) -> int:
    return sum(p.nbytes for p in parameters)


def free_memory(device: torch.device, ranks: int = 1) -> int:
    """Bytes that this process can still use where a model is.

    Args:
        device: of its parameters.
        ranks: processes that train together; those of this machine share its main memory.

    Returns:
        Their number.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _main_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def _main_memory() -> int:
    page, names = os.sysconf("SC_PAGE_SIZE"), os.sysconf_names
    free = page * os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES")
    known = Path("/proc/meminfo")
    if known.exists():  # what the system's caches hold can be had too
        lines = dict(line.split(":", 1) for line in known.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else free
    limit, used = (Path(name).read_text().strip() if Path(name).exists() else "" for name in _LIMITS)
    return max(0, min(free, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free
