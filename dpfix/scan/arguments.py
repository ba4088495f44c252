"""Checking the arguments of a call before anything is touched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.accountant import IAccountant
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.engines import BY_NAME
from dpfix.errors import ArgumentError, UnknownArgumentError
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.ranks import Ranks
from dpfix.scan.clipping import CLIPPING, check_clip_norm
from dpfix.scan.options import NORMS, SAMPLINGS, PerformanceOptions, PrivacyOptions
from dpfix.scan.values import number, shown

MODES = ("auto", *BY_NAME)
"""Legal values of ``grad_sample_mode``."""

_HELP = {
    "data_loader": "Pass a torch.utils.data.DataLoader over a data set with __len__ and __getitem__: Poisson sampling draws by "
    "index. A stream of samples or ready-made batches (WebDataset, torchdata.nodes, tf.data) has to be indexed first.",
    "optimizer": "Pass the torch.optim.Optimizer that the training loop uses; several over parts of one model as "
    "dpfix.JoinedOptimizer(first, second).",
}
"""What to pass instead of another object, where that needs more words."""


def check_objects(module: Any, optimizer: Any, data_loader: Any, privacy_engine: Any = None) -> None:
    """The objects have to be what the training loop uses, and finished.

    Raises:
        ArgumentError: one has another type, or its constructor did not run to the end.
    """
    for name, value, kind, made in (
        ("module", module, nn.Module, "_parameters"),
        ("optimizer", optimizer, Optimizer, "param_groups"),
        ("data_loader", data_loader, DataLoader, "dataset"),
        ("privacy_engine", privacy_engine, PrivacyEngine, "accountant"),
    ):
        if name == "privacy_engine" and value is None:
            continue
        if not isinstance(value, kind):
            raise ArgumentError(
                f"{name} is {type(value).__name__}, not a {kind.__module__}.{kind.__qualname__}.",
                help=_HELP.get(name, f"Pass the {name} that the training loop uses."),
                path=name,
            )
        if not hasattr(value, made):
            raise ArgumentError(
                f"{name} is a {type(value).__name__} without {made}: its constructor did not run to the end.",
                help="Call super().__init__() in it.",
                path=name,
            )
    accountant = getattr(privacy_engine, "accountant", None)
    if privacy_engine is not None and not isinstance(accountant, IAccountant):
        raise ArgumentError(
            f"privacy_engine.accountant is {type(accountant).__name__}, not an accountant of Opacus:",
            "nothing would count the steps.",
            "Use dpfix.SafePrivacyEngine(accountant='prv').",
            path="privacy_engine",
        )


def check_functions(criterion: Any, training_step: Any) -> None:
    """What computes the loss has to be callable.

    Raises:
        ArgumentError: it is not.
    """
    for name, value in (("criterion", criterion), ("training_step", training_step)):
        if value is not None and not callable(value):
            raise ArgumentError(
                f"{name} is {type(value).__name__}, which cannot be called.",
                help=f"Pass the function or module that computes the loss, or leave {name} out.",
                path=name,
            )


def check_values(
    privacy: PrivacyOptions, performance: PerformanceOptions, module: nn.Module, noise_multiplier: Any
) -> None:
    """Every value has to be legal.

    Args:
        module: the model, for the number of its parameters.

    Raises:
        ArgumentError: one is not; the message lists the legal values and the nearest.
    """
    check_choice("loss_reduction", privacy.loss_reduction, ("mean", "sum"))
    mode = performance.grad_sample_mode
    check_choice("grad_sample_mode", mode, MODES, _GHOST if isinstance(mode, str) and mode.startswith("ghost") else "")
    check_choice("norm", privacy.norm, NORMS)
    check_choice("sampling", privacy.sampling, SAMPLINGS)
    check_choice("clipping", privacy.clipping, CLIPPING)
    if privacy.sampling == "fixed" and performance.max_physical_batch_size is not None:
        raise ArgumentError(
            f"max_physical_batch_size={performance.max_physical_batch_size!r} with a loader that goes on drawing by itself:",
            "only a loader of dpfix's can deliver its batches in parts.",
            "Use Opacus's BatchMemoryManager around the loop, or leave out poisson_sampling=False and sampling='fixed'.",
            path="max_physical_batch_size",
        )
    if (noise := number(noise_multiplier)) is None or noise < 0:
        raise ArgumentError(
            f"noise_multiplier={shown(noise_multiplier)} must be a finite number >= 0:",
            "the noise's standard deviation as a multiple of max_grad_norm.",
            "Typical values are 0.5 to 2.",
            path="noise_multiplier",
        )
    check_clip_norm(privacy, module)
    if (share := number(privacy.checks)) is None or not 0 <= share <= 1:
        raise ArgumentError(
            f"checks={shown(privacy.checks)} is not a number from 0 to 1:",
            "the share of the training time that checks of random real steps may take.",
            "The default is 0.02; 0 leaves the checks of the first steps and of steps on which anything new is seen.",
            path="checks",
        )


_GHOST = (
    "Leave grad_sample_mode at 'auto', and loop and criterion as they are: its engine `bookkeeping` clips from norms as ghost "
    "clipping does, without per-sample gradients."
)


def check_choice(name: str, value: Any, legal: tuple[str, ...], instead: str = "") -> None:
    """An option has one of its values.

    Args:
        name: of the option.
        value: what was given.
        legal: its values.
        instead: a way out; the most similar value if there is none.

    Raises:
        ArgumentError: it has not.
    """
    if isinstance(value, str) and value in legal:
        return
    near = difflib.get_close_matches(value, legal, n=1) if isinstance(value, str) and len(value) < 80 else []
    raise ArgumentError(
        f"{name}={shown(value)} is not one of {', '.join(map(repr, legal))}.",
        help=instead or (f"Did you mean {near[0]!r}?" if near else ""),
        path=name,
    )


def check_ranks(ranks: Ranks, privacy: PrivacyOptions, secure_mode: bool) -> None:
    """What cannot be done on several processes yet.

    Raises:
        ArgumentError: something of that was asked for.
    """
    if ranks.size == 1 and not ranks.sharded:
        return
    several = "a model on which fully_shard was called" if ranks.sharded else f"{ranks.size} ranks"
    if privacy.clipping in {"per_layer", "adaptive"}:
        raise ArgumentError(
            f"clipping={privacy.clipping!r} with {several}:",
            "Opacus's optimizers for it hold whole parameters, on one process.",
            "Pass clipping='flat', 'automatic' or 'per_group'.",
            path="clipping",
        )
    if privacy.sampling in {"shuffle", "truncated"} and ranks.size > 1:
        raise ArgumentError(
            f"sampling={privacy.sampling!r} with {ranks.size} ranks:",
            "the ranks share Poisson draws only.",
            "Leave out sampling, or train on one process.",
            path="sampling",
        )
    if secure_mode:
        raise ArgumentError(
            f"secure_mode=True with {several}:",
            "the ranks agree on their draws by a seed, and spread models get their noise by one; neither is cryptographic.",
            "Train on one process, or without secure_mode.",
            path="privacy_engine",
        )


def check_whole_batches(arguments: Mapping[str, Any], trainer: str) -> None:
    """Batches are not delivered in parts to who counts a step for each that it gets.

    Args:
        arguments: of the call.
        trainer: who counts, in words.

    Raises:
        ArgumentError: they are to be.
    """
    if arguments.get("max_physical_batch_size") is not None:
        raise ArgumentError(
            f"max_physical_batch_size={shown(arguments['max_physical_batch_size'])} with {trainer}:",
            "it counts a step for every part of a batch, and ends a pass after len(loader) of them, of which there may be more.",
            "Leave it out, with a smaller batch size, or write the loop yourself with make_private_safe.",
            path="max_physical_batch_size",
        )


def check_wrapping(performance: PerformanceOptions, wrap_model: bool) -> None:
    """Some engines work through Opacus's wrapper only.

    Raises:
        ArgumentError: one of them was asked for without it.
    """
    mode = performance.grad_sample_mode
    if not wrap_model and mode != "auto" and BY_NAME[mode].needs_wrapper:
        raise ArgumentError(
            f"grad_sample_mode={mode!r} needs wrap_model=True:",
            "Opacus's expanded weights work through its wrapper.",
            "Pass wrap_model=True, or leave grad_sample_mode at 'auto'.",
            path="wrap_model",
        )


def check_randomness(privacy: PrivacyOptions, secure_mode: bool) -> None:
    """What noise and draws are to come from has to be usable, and to agree with the privacy engine.

    Raises:
        ArgumentError: it is not, or does not.
    """
    seed, generator = privacy.seed, privacy.noise_generator
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64):
        raise ArgumentError(
            f"seed={shown(seed)} is not a whole number from 0 to 2**64 - 1, nor None.",
            "Noise and draws would not follow from it.",
            "Leave it out to train: the operating system then seeds them. Pass for example seed=0 to repeat an experiment.",
            path="seed",
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            f"noise_generator is {type(generator).__name__}, not a torch.Generator.",
            help="Pass torch.Generator(device).manual_seed(...), with the device of the parameters, or seed=.",
            path="noise_generator",
        )
    if secure_mode and privacy.reproducible:
        name = "seed" if seed is not None else "noise_generator"
        raise ArgumentError(
            f"{name}= with secure_mode=True:",
            "cryptographic noise is noise that nobody can compute again.",
            f"Leave out {name}, or use an engine without secure_mode.",
            path=name,
        )


def check_names(given: Iterable[str], legal: Iterable[str], known: Iterable[str]) -> None:
    """No keyword is ignored.

    Args:
        given: names of the further options of the call.
        legal: names that Opacus's optimizers take.
        known: names of the call's own arguments, for the hint.

    Raises:
        UnknownArgumentError: a name is neither.
    """
    legal = set(legal)
    for name in given:
        if name not in legal:
            near = difflib.get_close_matches(name, [*known, *legal], n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UnknownArgumentError(
                f"make_private_safe() has no argument `{name}`.{hint}",
                "Opacus ignores unknown names silently; dpfix does not.",
                path=name,
            )


def check_delta(delta: Any) -> float:
    """Delta has to be a probability.

    Returns:
        The number.

    Raises:
        ArgumentError: it does not lie between 0 and 1.
    """
    found = number(delta)
    if found is None or not 0 < found < 1:
        raise ArgumentError(
            f"delta={shown(delta)} must lie between 0 and 1, and should be smaller than 1 / number of samples.",
            "It is the probability with which the bound may fail.",
            "Pass for example delta=1e-5.",
            path="delta",
        )
    return found


def check_budget(target_epsilon: Any, epochs: Any) -> tuple[float, float]:
    """A budget and its duration have to be positive.

    Returns:
        Both numbers.

    Raises:
        ArgumentError: one is not.
    """
    budget, passes = number(target_epsilon), number(epochs)
    if budget is None or passes is None or not (budget > 0 and passes > 0):
        raise ArgumentError(
            f"target_epsilon={shown(target_epsilon)} and epochs={shown(epochs)} must be positive finite numbers:",
            "they are the budget and the number of passes over data_loader it is to last for.",
            "Pass for example target_epsilon=8.0, epochs=20.",
            path="epochs" if budget is not None and budget > 0 else "target_epsilon",
        )
    return budget, passes


def check_augmentation(privacy: PrivacyOptions) -> None:
    """Views of samples are made by the private loader.

    Raises:
        ArgumentError: ``augmentation`` is of another kind, or there is no private loader.
    """
    augmentation = privacy.augmentation
    if augmentation is None:
        return
    if not isinstance(augmentation, AugmentationMultiplicity):
        raise ArgumentError(
            f"augmentation is {type(augmentation).__name__}.",
            help="Pass dpfix.AugmentationMultiplicity(transform, k=8).",
            path="augmentation",
        )
    if not privacy.poisson_sampling:
        raise ArgumentError(
            "augmentation needs poisson_sampling=True:",
            "the views are made by the private loader, and poisson_sampling=False, as sampling='fixed', leaves the loader alone.",
            "For batches of your own, collate the views of a sample next to each other.",
            path="augmentation",
        )
