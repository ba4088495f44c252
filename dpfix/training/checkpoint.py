"""Checkpoints from which a private training goes on exactly as it would have: Opacus's file, and what it leaves out.

Opacus saves the weights, the optimizer and the accountant. Added are the generators, the plan, and the noise and clip norm:
what a scheduler has made of the call's values goes on, while a call that says other values is obeyed. Noise and draws go on
in a training with a seed only: without one they are new, so that two that go on from one file never share their noise.
Everything is tensors and plain values, so that loading never runs code from the file.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from torch import nn

from dpfix.errors import CheckpointError
from dpfix.instrument.rng import GeneratorStates
from dpfix.instrument.source import warn_user
from dpfix.plan import Region
from dpfix.training.earlier import ENTRY, without_entry
from dpfix.training.lineage import remember
from dpfix.training.releases import Book, book_of, read_state, settled
from dpfix.training.step_guard import StepGuard
from dpfix.weights.copies import unwrap
from dpfix.weights.load import AS_IS, keyed_as_original, load_pretrained

_LOG = logging.getLogger("dpfix")


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


def save(
    engine: PrivacyEngine, path: Any, objects: Objects, more: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Write a checkpoint.

    Args:
        engine: whose accountant is saved.
        path: file name or binary file.
        objects: whose state is saved.
        more: further entries.
        options: further arguments of ``torch.save``.
    """
    content = dict(more)
    content["module_state_dict"] = keyed_as_original(unwrap(objects.module))
    content["privacy_accountant_state_dict"] = dict(settled(engine).state_dict())
    optimizer = objects.optimizer
    states = {"optimizer": optimizer} | dict(objects.schedulers)
    content |= {f"{name}_state_dict": s.state_dict() for name, s in states.items() if s is not None}
    content[ENTRY] = {
        "generators": _generators(objects),
        "randomness": _randomness(optimizer),
        "plan": _plan(optimizer),
        "privacy": _privacy(optimizer),
        "releases": book_of(engine).state(),
    }
    torch.save(content, path, **options)


def load(
    engine: PrivacyEngine, path: Any, objects: Objects, strict: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a checkpoint into the objects of a call that was made in the same way.

    Args:
        engine: whose accountant goes on.
        path: file name or binary file.
        objects: what gets the state.
        strict: refuse weights that do not fit.
        options: further arguments of ``torch.load``.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: the file holds more than tensors and plain values, is no checkpoint, or is another accountant's.
    """
    try:
        arguments: dict[str, Any] = {"weights_only": True, **options}
        content = torch.load(path, **arguments)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path!r} holds more than tensors and plain values, and reading it would run code from the file.",
            help="If you trust it, pass torch_load_kwargs={'weights_only': False}.",
            path="path",
        ) from error
    _check(content, engine)
    added, optimizer = content.get(ENTRY, {}), objects.optimizer
    _compare_plans(added.get("plan"), _plan(optimizer))
    load_pretrained(objects.module, content["module_state_dict"], source=AS_IS, strict=strict)
    states = {f"{name}_state_dict": content.get(f"{name}_state_dict") for name in ("optimizer", *objects.schedulers)}
    if "releases" in added:
        states["optimizer_state_dict"] = without_entry(states["optimizer_state_dict"])
    else:
        _load_history(engine, content["privacy_accountant_state_dict"])
    for name, target in ({"optimizer": optimizer} | dict(objects.schedulers)).items():
        _restore(name, target, states[f"{name}_state_dict"])
    if "releases" in added:
        _take_releases(engine, objects, added["releases"])
    if not added:
        _warn(
            "it holds no generators and no plan (it was saved by Opacus): the training goes on, but not with the same noise."
        )
        return content
    _restore_regions(added.get("plan"), optimizer)
    _restore_privacy(optimizer, added["privacy"])
    _restore_generators(added["generators"], objects)
    _restore_randomness(added.get("randomness", {}), optimizer)
    return content


def _check(content: Any, engine: PrivacyEngine) -> None:
    needed = ("module_state_dict", "privacy_accountant_state_dict")
    if not isinstance(content, dict) or any(name not in content for name in needed):
        raise CheckpointError(
            "the file is no checkpoint of a private training: it needs module_state_dict and privacy_accountant_state_dict.",
            help="For weights alone there is dpfix.load_pretrained.",
            path="path",
        )
    read_state(content.get(ENTRY, {}).get("releases", Book().state()))
    saved, here = content["privacy_accountant_state_dict"].get("mechanism"), engine.accountant.mechanism()
    if saved != here:
        raise CheckpointError(
            f"the checkpoint's accountant is {saved!r}, and this privacy engine's is {here!r}: their histories cannot be "
            "added up.",
            help=f"Use SafePrivacyEngine(accountant={saved!r}).",
            path="accountant",
        )


def _take_releases(engine: PrivacyEngine, objects: Objects, releases: Any) -> None:
    """Unite what was released before the file was saved with what was released here."""
    guard = _guard(objects.optimizer)
    if guard is not None:
        guard.guarded.accounting.take(releases)
        return
    trainings, others = read_state(releases)
    book_of(engine).take(engine.accountant, trainings, others)
    remember(unwrap(objects.module).parameters(), trainings)


def _load_history(engine: PrivacyEngine, state: Mapping[str, Any]) -> None:
    """A file of Opacus's, or of an earlier version, has a plain history."""
    accountant: Any = settled(engine)
    accountant.load_state_dict(state)
    settled(engine)


def _restore(name: str, target: Any, state: Any) -> None:
    if target is not None and state is not None:
        target.load_state_dict(state)
    elif state is not None:
        _warn(f"{name}: the checkpoint has its state, and none was given.")
    elif target is not None:
        _warn(f"{name}: one was given, and the checkpoint has no state of it.")


# ------------------------------------------------------------------ the plan


def _guard(optimizer: Any) -> StepGuard | None:
    """The guard of a private training; Opacus's own optimizers have none."""
    return getattr(optimizer, "guard", None)


def _plan(optimizer: Any) -> dict[str, Any]:
    guard = _guard(optimizer)
    if guard is None:
        return {}
    plan = guard.plan
    regions = {"no_grad_regions": [_named(region) for region in plan.no_grad_regions]}
    return {"engine": plan.engine} | {name: _value(getattr(plan, name)) for name in _SAME} | regions


_SAME = {
    "frozen_parameters": "what is not trained",
    "fixed_norms": "the BatchNorm layers that are in eval()",
    "loss_reduction": "the loss reduction",
    "views": "the number of views per sample",
    "weighted_by_rows": "whether a sample weighs as much as it has rows",
}
"""Parts of a plan in which another one is another training, in words."""


def _value(part: Any) -> Any:
    return list(part) if isinstance(part, tuple) else part


def _named(region: Region) -> list[Any]:
    return [region.site.path, region.site.root, region.site.line, region.site.number, region.of]


def _compare_plans(saved: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    if not saved or not here:
        return
    for name, words in _SAME.items():
        if name in saved and saved[name] != here[name]:
            raise CheckpointError(
                f"the checkpoint's training is another one than this: {words} was {saved[name]!r} there ({name} of the plan), "
                f"and is {here[name]!r} here.",
                help="The model, the loss or the arguments of the call differ; make the call as before.",
                path=name,
            )
    if saved["engine"] != here["engine"]:
        _LOG.warning(
            "checkpoint: it was trained with the engine %r, and this call chose %r: the same up to rounding. For the very same "
            "numbers pass grad_sample_mode=%r.",
            *(saved["engine"], here["engine"], saved["engine"]),
        )


def _restore_regions(saved: Mapping[str, Any] | None, optimizer: Any) -> None:
    """A call that has got its graph back in the earlier run, since gradient reached it, must not lose a step again."""
    guard = _guard(optimizer)
    if not saved or "no_grad_regions" not in saved or guard is None:
        return
    dropped = [r for r in guard.plan.no_grad_regions if _named(r) not in saved["no_grad_regions"]]
    guard.regions.drop(dropped)
    for region in dropped:
        _LOG.warning(
            "checkpoint: the call of %r (%s) ran with its graph when it was saved, and does so again; this call had made it a "
            "no-grad region.",
            *(region.site.path or "the model", region.site.line),
        )


def _privacy(optimizer: Any) -> dict[str, list[Any]]:
    """What the call said and what is in force, by name."""
    guard = _guard(optimizer)
    called = {} if guard is None else guard.called
    return {name: [_plain(value), _plain(getattr(optimizer, name))] for name, value in called.items()}


def _restore_privacy(optimizer: Any, saved: Mapping[str, list[Any]]) -> None:
    """What a scheduler made of a value goes on; a call that says another value than the saved one's is obeyed."""
    for name, (here, now) in _privacy(optimizer).items():
        called, value = saved.get(name, (here, now))
        if called != here:
            _warn(
                f"{name} was {value} when it was saved, and is {now} from here on, as this call says. The accountant counts "
                "every step as it was made."
            )
        elif value != now:
            _warn(f"{name}={value} is taken from the checkpoint, where a scheduler had set it; the call said {here}.")
            setattr(optimizer, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, (torch.Tensor, np.generic)) else value


# ------------------------------------------------------------------ generators


def _own(objects: Objects) -> dict[str, torch.Generator]:
    """Generators that the script has given, for the noise and for the workers of the loader."""
    found = {
        name: getattr(of, "generator", None)
        for name, of in (("noise", objects.optimizer), ("loader", objects.data_loader))
    }
    return {name: g for name, g in found.items() if isinstance(g, torch.Generator)}


def _generators(objects: Objects) -> dict[str, Any]:
    own = {name: g.get_state() for name, g in _own(objects).items()}
    return GeneratorStates.now().as_plain_values() | {"own": own}


def _restore_generators(saved: Mapping[str, Any], objects: Objects) -> None:
    GeneratorStates.from_plain_values(saved).put_back()
    here = _own(objects)
    for name in saved["own"].keys() ^ here.keys():
        _warn(
            f"the {name} has a generator of its own in {'the checkpoint' if name in saved['own'] else 'this call'} only."
        )
    for name in saved["own"].keys() & here.keys():
        here[name].set_state(saved["own"][name])


def _randomness(optimizer: Any) -> dict[str, Any]:
    randomness = getattr(optimizer, "randomness", None)
    return {} if randomness is None else randomness.state()


def _restore_randomness(saved: Mapping[str, Any], optimizer: Any) -> None:
    randomness = getattr(optimizer, "randomness", None)
    if randomness is not None:
        optimizer.guard.noise.went_back()
    if randomness is None or (not saved and randomness.seed is None):
        return
    if not randomness.go_on(saved):
        _warn(
            "noise and draws do not go on with the same numbers, since it was not saved with the seed= of this call. Make the "
            "call with the same seed to repeat an experiment exactly."
        )


def _warn(text: str) -> None:
    warn_user(f"checkpoint: {text}")
