"""Generators of random numbers that a script keeps itself: ``numpy.random.default_rng``, ``random.Random``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dpfix.instrument.fixed_randomness import DRAWS, Draw
from dpfix.instrument.reachable import reachable

_KINDS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


Own = tuple[tuple[Any, Any], ...]
"""Generators, each with the state that it had."""


def own_generators(module: nn.Module, step: Any) -> Own:
    """The generators that a model's modules and a training step refer to, with their present states.

    Returns:
        Each once.
    """
    roots: list[Any] = [step]
    for part in module.modules():
        if not type(part).__module__.startswith("torch"):
            roots += [type(part).forward, *vars(part).values()]
    return generators_of(*roots)


def generators_of(*roots: Any) -> Own:
    """The generators that functions, methods and callable objects refer to, with their present states."""
    held = [part for root in roots for part in getattr(getattr(root, "__self__", None), "__dict__", {}).values()]
    calls = [root.__call__ for root in (*roots, *held) if callable(root) and hasattr(root, "__dict__")]
    found = reachable(*(root for root in (*roots, *calls) if callable(root) or isinstance(root, _KINDS)))
    return tuple((thing, _state(thing)) for thing in found if isinstance(thing, _KINDS))


def states_of(generators: Own) -> str:
    """Where generators are now; equal after alike draws."""
    return repr([_state(generator) for generator, _ in generators])


@contextmanager
def drawing(generators: Own, draw: Draw) -> Iterator[None]:
    """The generators give what a draw says, the same in every run; they are afterwards as before.

    Yields:
        Nothing.
    """
    before = [_state(generator) for generator, _ in generators]
    for generator, first in generators:
        if draw.torch == DRAWS[0].torch:
            _put_back(generator, first)
        else:
            _seed(generator, draw)
    try:
        yield
    finally:
        for (generator, _), state in zip(generators, before, strict=True):
            _put_back(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _seed(generator: Any, draw: Draw) -> None:
    if isinstance(generator, random.Random):
        generator.seed(draw.python)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(draw.numpy).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(draw.numpy)
    else:
        generator.manual_seed(draw.torch)
