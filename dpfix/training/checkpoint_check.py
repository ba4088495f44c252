"""What a checkpoint holds has to be what a training saves, before anything is changed.

A checksum says that a file is as it was saved. Files of Opacus and of earlier versions have none: there the values
themselves have to be possible. What no training can go on from is refused either way.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from dpfix.errors import CheckpointError
from dpfix.instrument.rng import GeneratorStates
from dpfix.sampling.randomness import device_and_lane
from dpfix.training.checkpoint_file import ENTRY, damaged
from dpfix.training.releases import read_state
from dpfix.weights.copies import unwrap
from dpfix.weights.files import FAILURES
from dpfix.weights.load import keyed_as_original


@dataclass(frozen=True)
class Objects:
    """The objects of a call whose state is saved and read.

    Attributes:
        module: the model, wrapped or not; its weights are saved under the keys of its original layers.
        optimizer: the private optimizer, or ``None``.
        data_loader: the loader, for the state of a generator of its own, or ``None``.
        schedulers: Opacus's schedulers by name; ``None`` where there is none.
    """

    module: nn.Module
    optimizer: Any
    data_loader: Any
    schedulers: Mapping[str, Any]

    def stateful(self) -> dict[str, Any]:
        """What has a ``state_dict`` of its own beside the model.

        Returns:
            The objects by name.

        Raises:
            CheckpointError: something was given that has none.
        """
        given = {name: thing for name, thing in ({"optimizer": self.optimizer} | dict(self.schedulers)).items()}
        for name, thing in given.items():
            if thing is not None and not callable(getattr(thing, "load_state_dict", None)):
                raise CheckpointError(
                    f"{name} is {type(thing).__name__}, which has no state to save or load.",
                    help=f"Pass the {name} of the training.",
                    path=name,
                )
        return {name: thing for name, thing in given.items() if thing is not None}


def check(content: Mapping[str, Any], objects: Objects, verified: bool) -> None:
    """Refuse what no training has saved.

    Args:
        content: what the file holds.
        objects: that are to go on from it.
        verified: whether a checksum says that this is what was saved.

    Raises:
        CheckpointError: something of it is not legal; nothing was changed.
    """
    stateful, module = objects.stateful(), unwrap(objects.module)
    parts: dict[str, Callable[[], None]] = {
        "the accountant's history": lambda: _history(content["privacy_accountant_state_dict"]["history"], verified),
        "the weights": lambda: _weights(content["module_state_dict"], module, verified),
    }
    for name, thing in stateful.items():
        state = content.get(f"{name}_state_dict")
        if state is not None:
            checked = _optimizer if name == "optimizer" else _scheduler
            parts[f"the state of the {name}"] = lambda checked=checked, state=state, thing=thing: checked(state, thing)
    if ENTRY in content:
        parts[f"the entry {ENTRY!r}"] = lambda: _added(content[ENTRY], verified)
    for name, checked in parts.items():
        try:
            checked()
        except FAILURES as error:
            raise CheckpointError(damaged(f"{name}: {error or type(error).__name__}")) from error


def _ensure(holds: object, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any, name: str, least: float = -sys.float_info.max) -> None:
    _ensure(_is_number(value) and least <= value < math.inf, f"{name} is {value!r}")


def _history(history: Any, verified: bool) -> None:
    _ensure(isinstance(history, (list, tuple)), f"it is {type(history).__name__}")
    for noise, rate, steps in history:
        _finite(noise, "a noise multiplier", 0.0)
        _finite(rate, "a sampling rate", 0.0)
        _ensure(rate > 0 and (verified or rate <= 1), f"a sampling rate is {rate!r}")
        _ensure(type(steps) is int and steps > 0, f"a number of steps is {steps!r}")


def _weights(saved: Mapping[str, Any], module: nn.Module, verified: bool) -> None:
    here = keyed_as_original(module)
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, value in saved.items():
        now = here.get(name)
        if not isinstance(now, torch.Tensor):
            continue  # a key without a place is load_pretrained's to name
        _ensure(isinstance(value, torch.Tensor), f"{name} is {type(value).__name__}")
        _ensure(value.dtype == now.dtype, f"{name} is {value.dtype}, and {now.dtype} in this model")
        if _all_finite(value) or not _all_finite(now):
            continue
        _ensure(verified and name not in trained, f"{name} is not finite")


def _all_finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _optimizer(saved: Mapping[str, Any], optimizer: Any) -> None:
    groups, states = saved["param_groups"], saved["state"]
    here = optimizer.param_groups
    _ensure(len(groups) == len(here), f"it has {len(groups)} parameter groups, and this one {len(here)}")
    known = type(getattr(optimizer, "original_optimizer", optimizer)).__module__.startswith("torch.optim")
    for group, now in zip(groups, here, strict=True):
        _ensure(
            len(group["params"]) == len(now["params"]),
            f"a group has {len(group['params'])} parameters, and {len(now['params'])} here",
        )
        for name in group.keys() & now.keys() - {"params"}:
            _like(group[name], now[name], name)
        for number, p in zip(group["params"], now["params"], strict=True):
            for name, value in states.get(number, {}).items():
                _of_parameter(name, value, p, known)


def _like(value: Any, now: Any, name: str) -> None:
    """An option of a group has to be of the kind that it has here."""
    if isinstance(now, (list, tuple)) and all(map(_is_number, now)):
        _ensure(isinstance(value, (list, tuple)) and len(value) == len(now), f"{name} is {value!r}")
        for item in value:
            _finite(item, name)
    elif _is_number(now) and abs(now) < math.inf:
        _finite(value.item() if isinstance(value, torch.Tensor) else value, name)


def _of_parameter(name: str, value: Any, parameter: torch.Tensor, known: bool) -> None:
    """What an optimizer remembers of a parameter; torch's own remember tensors of its shape, and numbers."""
    if isinstance(value, torch.Tensor):
        _ensure(_all_finite(value), f"{name} is not finite")
        if known:
            whole = torch.broadcast_shapes(value.shape, parameter.shape)  # Adafactor keeps sums of rows and columns
            _ensure(
                whole == parameter.shape or value.numel() == 1,
                f"{name} has the shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}",
            )
    elif _is_number(value):
        _finite(value, name)
    elif known:
        _ensure(value is None or isinstance(value, bool), f"{name} is {value!r}")


def _scheduler(saved: Mapping[str, Any], scheduler: Any) -> None:
    if not type(scheduler).__module__.startswith("opacus."):
        return  # its own load_state_dict has to know
    here = plain_state(scheduler)
    _ensure(saved.keys() == here.keys(), f"it has {', '.join(map(str, saved))}, and this one {', '.join(here)}")
    for name, value in saved.items():
        _like(value, here[name], name)


def plain_state(thing: Any) -> Any:
    """The state of an optimizer or a scheduler without what only its script can have: the function of a schedule."""
    state = thing.state_dict()
    return {name: value for name, value in state.items() if not callable(value)} if isinstance(state, dict) else state


# ------------------------------------------------------------------ what Opacus leaves out


def _added(added: Mapping[str, Any], verified: bool) -> None:
    generators(added["generators"])
    for generator in added["generators"]["own"].values():
        _ensure(_is_state(generator), "a generator of the script's has no state")
    for name, values in added["privacy"].items():
        called, now = values
        _scheduled(name, called)
        _scheduled(name, now)
        stopped = name == "noise_multiplier" and now == 0 and called > 0
        _ensure(verified or not stopped, f"{name} is {now!r} where the call said {called!r}")
    for name, value in added.get("adaptive", {}).items():
        _finite(value, name)
    plan = added.get("plan", {})
    _ensure(not plan or isinstance(plan["engine"], str), f"the engine is {plan and plan['engine']!r}")
    streams(added.get("randomness", {}))
    if "releases" in added:
        read_state(added["releases"])
    position = added.get("pass", {})
    if position:
        done, batches = position["done"], position["of"]
        _ensure(type(done) is type(batches) is int and 0 <= done < batches, f"{done!r} of {batches!r} batches are done")
        seed = position.get("seed")
        _ensure(seed is None or (type(seed) is int and seed >= 0), f"the seed of the pass is {seed!r}")
        workers = position.get("workers")
        _ensure(workers is None or _is_state(workers), "the seeds of the workers have no state")


def _scheduled(name: str, value: Any) -> None:
    several: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    for one in several:
        _finite(one, name, 0.0)
        _ensure(one > 0 or name == "noise_multiplier", f"{name} is {one!r}")


def generators(saved: Mapping[str, Any]) -> None:
    """Try states of the script's generators, on others."""
    states = GeneratorStates.from_plain_values(saved)
    random.Random().setstate(states.python)
    np.random.RandomState().set_state(states.numpy)
    torch.Generator().set_state(states.cpu)
    _ensure(all(map(_is_state, states.cuda)), "a generator of a GPU has no state")


def streams(saved: Mapping[str, Any]) -> None:
    """Try where the noise and the draws of a training with a seed were, on other generators."""
    if not saved:
        return
    _ensure(type(saved["seed"]) is int, f"the seed is {saved['seed']!r}")
    for name, state in [*saved["noise"].items(), *saved["draws"].items()]:
        _ensure(_is_state(state), f"the generator on {name} has no state")
        if device_and_lane(name)[0].type == "cpu":
            torch.Generator().set_state(state.cpu())


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1
