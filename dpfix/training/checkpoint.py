"""Checkpoints from which a private training goes on exactly as it would have: Opacus's file, and what it leaves out.

Opacus saves the weights, the optimizer and the accountant. Added are the generators, the plan, and the noise and clip norm:
what a scheduler has made of the call's values goes on, while a call that says other values is obeyed. Noise and draws go on
in a training with a seed only: without one they are new, so that two that go on from one file never share their noise.
Everything is tensors and plain values, so that loading never runs code from the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine

from dpfix.errors import CheckpointError
from dpfix.instrument.rng import GeneratorStates
from dpfix.instrument.source import warn_user
from dpfix.plan import Region
from dpfix.sampling.position import Rest
from dpfix.training import checkpoint_file
from dpfix.training.checkpoint_check import Objects, check, plain_state
from dpfix.training.checkpoint_file import ENTRY, damaged
from dpfix.training.clipping import way_to_clip
from dpfix.training.earlier import without_entry
from dpfix.training.guards.ranks import compare_ranks, number_of_ranks
from dpfix.training.lineage import remember
from dpfix.training.put_back import put_back_on_error
from dpfix.training.releases import book_of, read_state, settled
from dpfix.training.step_guard import StepGuard
from dpfix.weights.copies import unwrap
from dpfix.weights.files import FAILURES
from dpfix.weights.load import AS_IS, keyed_as_original, load_pretrained

_LOG = logging.getLogger("dpfix")


def save(
    engine: PrivacyEngine, path: Any, objects: Objects, more: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all.

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
    content |= {f"{name}_state_dict": plain_state(thing) for name, thing in objects.stateful().items()}
    content[ENTRY] = {
        "generators": _generators(objects),
        "randomness": _randomness(optimizer),
        "pass": _position(optimizer),
        "plan": _plan(optimizer),
        "privacy": _privacy(optimizer),
        "adaptive": _adaptive(optimizer),
        "clipping": way_to_clip(optimizer),
        "ranks": number_of_ranks(optimizer),
        "releases": book_of(engine).state(),
    }
    checkpoint_file.write(content, path, options)


def load(
    engine: PrivacyEngine, path: Any, objects: Objects, strict: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a checkpoint into the objects of a call that was made in the same way; all of it, or nothing is changed.

    Args:
        engine: whose accountant goes on.
        path: file name or binary file.
        objects: what gets the state.
        strict: refuse weights that do not fit.
        options: further arguments of ``torch.load``.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors and plain values, is no checkpoint, is another
            accountant's, or does not fit the objects.
    """
    content, verified = checkpoint_file.read(path, options)
    _check_mechanism(content, engine)
    check(content, objects, verified)
    added: Mapping[str, Any] = content.get(ENTRY, {})
    _compare_plans(added.get("plan"), _plan(objects.optimizer))
    targets = objects.stateful()
    schedulers = [thing for name, thing in targets.items() if name != "optimizer"]
    own = list(_own(objects).values())
    try:
        with put_back_on_error(
            unwrap(objects.module), objects.optimizer, [engine.accountant, *schedulers], own
        ) as undo:
            load_pretrained(objects.module, content["module_state_dict"], source=AS_IS, strict=strict)
            _restore_states(engine, content, objects, undo)
            if added:
                _restore_added(added, objects, undo)
            else:
                _warn(
                    "it holds no generators and no plan (it was saved by Opacus): the training goes on, but not with the same "
                    "noise."
                )
    except CheckpointError:
        raise
    except FAILURES as error:
        raise CheckpointError(damaged(f"{type(error).__name__}: {error}")) from error
    return content


def _restore_states(
    engine: PrivacyEngine, content: Mapping[str, Any], objects: Objects, undo: list[Callable[[], None]]
) -> None:
    """The states of the optimizer and the schedulers, and everything that was released."""
    guard, added = _guard(objects.optimizer), content.get(ENTRY, {})
    undo.append(book_of(engine).put_back() if guard is None else guard.guarded.accounting.put_back())
    states = {name: content.get(f"{name}_state_dict") for name in ("optimizer", *objects.schedulers)}
    if "releases" in added:
        states["optimizer"] = without_entry(states["optimizer"])
    else:
        _load_history(engine, content["privacy_accountant_state_dict"])
    for name, target in ({"optimizer": objects.optimizer} | dict(objects.schedulers)).items():
        _restore(name, target, states[name])
    if "releases" in added:
        _take_releases(engine, objects, added["releases"])


def _restore_added(added: Mapping[str, Any], objects: Objects, undo: list[Callable[[], None]]) -> None:
    optimizer = objects.optimizer
    compare_ranks(added.get("ranks"), optimizer)
    _restore_regions(added.get("plan"), optimizer)
    _restore_privacy(optimizer, added["privacy"])
    _compare_clipping(optimizer, added.get("clipping"))
    _restore_adaptive(optimizer, added.get("adaptive", {}))
    _restore_generators(added["generators"], objects)
    _restore_position(added, optimizer, undo)
    _restore_randomness(added.get("randomness", {}), optimizer, undo)


def _check_mechanism(content: Mapping[str, Any], engine: PrivacyEngine) -> None:
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
    "per_person": "whether a sample is a person",
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
            if not (name == "max_grad_norm" and _adaptive(optimizer)):  # there it changes at every step
                _warn(
                    f"{name}={value} is taken from the checkpoint, where a scheduler had set it; the call said {here}."
                )
            setattr(optimizer, name, value)


def _compare_clipping(optimizer: Any, saved: Any) -> None:
    here = way_to_clip(optimizer)
    if saved is not None and here is not None and saved != here:
        _warn(f"clipping was {saved} when it was saved, and is {here} from here on, as this call says.")


_ADAPTIVE_OPTIONS = (
    "target_unclipped_quantile",
    "clipbound_learning_rate",
    "max_clipbound",
    "min_clipbound",
    "unclipped_num_std",
)
"""Attributes of an optimizer with adaptive clipping that the call has set."""
_ADAPTIVE_COUNTS = ("sample_size", "unclipped_num")
"""What such an optimizer counts in a logical batch."""


def _adaptive(optimizer: Any) -> dict[str, Any]:
    """Options and counts of adaptive clipping, by name; empty for another one."""
    names = (*_ADAPTIVE_OPTIONS, *_ADAPTIVE_COUNTS)
    return {name: _plain(getattr(optimizer, name)) for name in names if hasattr(optimizer, name)}


def _restore_adaptive(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """The counts go on; a call that says other options than the saved one's is obeyed."""
    for name, value in _adaptive(optimizer).items():
        if name in _ADAPTIVE_COUNTS:
            setattr(optimizer, name, saved.get(name, value))
        elif saved.get(name, value) != value:
            _warn(f"{name} was {saved[name]} when it was saved, and is {value} from here on, as this call says.")


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


def _restore_randomness(saved: Mapping[str, Any], optimizer: Any, undo: list[Callable[[], None]]) -> None:
    randomness = getattr(optimizer, "randomness", None)
    if randomness is not None:
        optimizer.guard.noise.went_back()
    if randomness is None or (not saved and randomness.seed is None):
        return
    before = randomness.state()
    undo.append(lambda: randomness.go_on(before))
    if not randomness.go_on(saved):
        _warn(
            "noise and draws do not go on with the same numbers, since it was not saved with the seed= of this call. Make the "
            "call with the same seed to repeat an experiment exactly."
        )


# ------------------------------------------------------------------ the pass over the loader


def _position(optimizer: Any) -> dict[str, Any]:
    """Where the training is in its pass over the private loader; empty between two passes."""
    guard = _guard(optimizer)
    ledger = None if guard is None else guard.guarded.ledger
    return {} if ledger is None else ledger.position.state()


def _restore_position(added: Mapping[str, Any], optimizer: Any, undo: list[Callable[[], None]]) -> None:
    """The next pass over the loader is the rest of the one in which the checkpoint was saved."""
    guard, saved = _guard(optimizer), added.get("pass", {})
    ledger = None if guard is None else guard.guarded.ledger
    if ledger is None:
        return
    position = ledger.position
    rest = None
    if saved and saved["of"] != position.batches:
        _warn(
            f"it was saved after {saved['done']} batches in a pass of {saved['of']} batches, and the loader of this call has "
            f"{position.batches}: the next pass is a whole one."
        )
    elif saved and position.reproducible and optimizer.randomness.seed == added["randomness"].get("seed"):
        script = GeneratorStates.from_plain_values(added["generators"])
        rest = Rest(saved["done"], saved["seed"], saved["workers"], script)
    elif saved:
        rest = Rest(saved["done"])
    undo.append(position.go_on(rest))


def _warn(text: str) -> None:
    warn_user(f"checkpoint: {text}")
