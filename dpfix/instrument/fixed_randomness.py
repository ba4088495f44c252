"""Running a model so that a sample's randomness is its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpfix.instrument.rng import GeneratorStates

_FEW = 16
"""A draw of so few numbers, one for all or one for each sample, may decide a branch."""


@dataclass(frozen=True)
class Draw:
    """What a step draws while it is compared with others: the same numbers for every run of one comparison.

    Attributes:
        torch: seed before every random operation of torch.
        python: seed of Python's generator before the step.
        numpy: seed of NumPy's global generator before the step.
        apart: whether operations of torch draw different numbers from each other.
        goes_on: whether Python's and NumPy's generators go on from where the run before has left them, as they do in a
            step that draws for one sample after the other.
    """

    torch: int
    python: int
    numpy: int
    apart: bool = False
    goes_on: bool = False

    def seed_outside(self) -> None:
        """Seed the generators of Python and NumPy, which no mode can fix."""
        if not self.goes_on:
            random.seed(self.python)
            np.random.seed(self.numpy)


DRAWS = (
    Draw(torch=7, python=1, numpy=1),
    Draw(torch=7133, python=737, numpy=2151),  # first uniform numbers below 0.02, the next ones below 0.25
    Draw(torch=8808, python=2560, numpy=1470),  # above 0.98 and 0.75
    Draw(torch=42, python=3, numpy=3, apart=True),
)
"""The draw of all proofs, and others in which a branch that is taken by chance goes the other way."""


def outside_states() -> int:
    """A number that changes when Python's or NumPy's global generator has drawn; alike after alike draws."""
    states = GeneratorStates.now()
    kind, keys, *rest = states.numpy
    return hash((states.python, kind, keys.tobytes(), *rest))


class FixedRandomness(TorchDispatchMode):
    """Every random operation gives fixed values that depend on the index in the last dimension alone.

    A sample alone and the same sample in a batch, wherever the batch dimension is, then see the same noise and the
    same dropout mask, so that their gradients can be compared. Values are drawn in single precision and then
    converted, so that a run in double precision sees the same ones.

    Args:
        stack: paths of the modules that are being called, kept by the caller.
        draw: which values; those of all proofs if not given.

    Attributes:
        random_ops: the random operations met, with the module paths that were being called.
        low_precision: whether a result in half precision was met.
        decides: whether so few numbers were drawn at once that a branch may depend on them.
    """

    def __init__(self, stack: list[str] | None = None, draw: Draw = DRAWS[0]) -> None:
        super().__init__()
        self.stack = stack if stack is not None else []
        self.random_ops: dict[str, set[str]] = {}
        self.low_precision = False
        self.decides = False
        self._draw = draw
        self._number = 0

    def __enter__(self) -> FixedRandomness:
        self._draw.seed_outside()
        return super().__enter__()

    @property
    def drawn(self) -> int:
        """How many operations have drawn."""
        return self._number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            self.random_ops.setdefault(func.__name__, set()).update(self.stack)
            self._number += 1
            seed = self._draw.torch + (self._number if self._draw.apart else 0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                drawn = _fixed(func, args, kwargs, seed)
            self.decides |= _may_decide(func, drawn)
            return drawn
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.low_precision = True
        return out


def _may_decide(func: Any, drawn: Any) -> bool:
    few = isinstance(drawn, torch.Tensor) and drawn.numel() <= _FEW and drawn.shape[1:].numel() == 1
    return few and "bernoulli" not in func.__name__  # a mask that is one number keeps everything, in every draw


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws: attention and dropout with probability 0 do not."""
    given = _given(func, args, kwargs)
    if "dropout_p" in (a.name for a in func._schema.arguments):
        return float(given.get("dropout_p") or 0) > 0
    return "dropout" not in func.__name__ or float(given.get("p") or 0) > 0


def _fixed(func: Any, args: Any, kwargs: Any, seed: int) -> Any:
    name = func.__name__.split(".")[0]
    given = _given(func, args, kwargs)
    if name == "native_dropout":
        keep = 1 - given["p"]
        mask = _spread(given["input"], lambda row: _keep(row, keep))
        return given["input"] * mask / max(1e-12, keep), mask.bool()
    if name == "multinomial":
        return _multinomial(func, given, seed)
    out = func(*args, **kwargs)
    fill = _FILL.get(name)
    if isinstance(out, torch.Tensor) and fill is not None:
        torch.manual_seed(seed)  # the draw above took as many numbers as there are rows
        out.copy_(_spread(out, lambda row: fill(row, given)))
    return out


def _multinomial(func: Any, given: dict[str, Any], seed: int) -> torch.Tensor:
    """Every row is drawn from its own weights with the same numbers, as if it were alone."""
    weights, others = given["self"], {k: v for k, v in given.items() if k != "self"}
    drawn = []
    for row in weights.reshape(-1, weights.shape[-1]):
        torch.manual_seed(seed)
        drawn.append(func(row, **others))
    return torch.stack(drawn).view(*weights.shape[:-1], -1)


def _spread(like: torch.Tensor, fill: Any) -> torch.Tensor:
    """A tensor like another, equal along every dimension but the last; constant if it has only one."""
    dtype = torch.float32 if like.dtype is torch.float64 else like.dtype
    row = torch.empty(like.shape[-1] if like.dim() > 1 else 1, dtype=dtype, device=like.device)
    fill(row)
    row = row.to(like.dtype)
    return row.expand(like.shape) if like.dim() else row.reshape(())


def _keep(row: torch.Tensor, probability: float) -> torch.Tensor:
    """A mask; one that would be constant keeps everything, since nothing could be compared behind it."""
    return row.bernoulli_(probability) if row.numel() > 1 else row.fill_(1)


def _bernoulli(row: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    p = given.get("p", 0.5)
    return _keep(row, p if isinstance(p, float) else 0.5)


_FILL: Mapping[str, Any] = {
    "randn": lambda row, given: row.normal_(),
    "randn_like": lambda row, given: row.normal_(),
    "normal_": lambda row, given: row.normal_(given.get("mean", 0.0), given.get("std", 1.0)),
    "rand": lambda row, given: row.uniform_(),
    "rand_like": lambda row, given: row.uniform_(),
    "uniform_": lambda row, given: row.uniform_(given.get("from", 0.0), given.get("to", 1.0)),
    "exponential_": lambda row, given: row.exponential_(given.get("lambd", 1.0)),
    "randint": lambda row, given: row.random_(given.get("low", 0), given["high"]),
    "randint_like": lambda row, given: row.random_(given.get("low", 0), given["high"]),
    "bernoulli_": _bernoulli,
    "bernoulli": _bernoulli,  # what dropout becomes under vmap
}
