"""Running a model so that a sample's randomness is its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpfix.instrument.fixed_outside import FixedOutside
from dpfix.instrument.own_draws import can_be_drawn, drawn, draws
from dpfix.instrument.precision import exact_products
from dpfix.instrument.rng import GeneratorStates
from dpfix.instrument.unfused import Unfused

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
        """Seed the generators of Python and NumPy, for what draws from them in a way that cannot be fixed."""
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
    converted, so that a run in double precision sees the same ones. Products are exact
    (:func:`~dpfix.instrument.precision.exact_products`), and kernels that draw inside are replaced by the operations that they
    are made of.

    Args:
        stack: paths of the modules that are being called, kept by the caller.
        draw: which values; those of all proofs if not given.

    Attributes:
        random_ops: the random operations met, with the module paths that were being called.
        low_precision: whether a result in half precision was met.
        decides: whether so few numbers were drawn at once that a branch may depend on them.
        outside: the draws of Python's and NumPy's generators.
    """

    def __init__(self, stack: list[str] | None = None, draw: Draw = DRAWS[0]) -> None:
        super().__init__()
        self.stack = stack if stack is not None else []
        self.random_ops: dict[str, set[str]] = {}
        self.low_precision = False
        self.decides = False
        self._draw = draw
        self._number = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        self._around = ExitStack()
        self.outside = FixedOutside(draw.python, draw.numpy, one_by_one=draw.apart)

    def __enter__(self) -> FixedRandomness:
        self._draw.seed_outside()
        self.outside.__enter__()
        self._around.enter_context(exact_products())
        if torch.cuda.is_initialized():
            self._around.enter_context(Unfused())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()
        self.outside.__exit__(*error)

    @property
    def drawn(self) -> int:
        """How many operations have drawn."""
        return self._number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func) and _draws(func, args, kwargs):
            self.random_ops.setdefault(func.__name__, set()).update(self.stack)
            self._number += 1
            seed = self._draw.torch + (self._number if self._draw.apart else 0)
            values = _fixed(func, args, kwargs, partial(self._seeded, seed))
            self.decides |= _may_decide(func, values)
            return values
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.low_precision = True
        return out

    def _seeded(self, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that begins anew; the global one is any thread's."""
        device = torch.device(device)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(seed)


def _may_decide(func: Any, values: Any) -> bool:
    few = isinstance(values, torch.Tensor) and values.numel() <= _FEW and values.shape[1:].numel() == 1
    return few and "bernoulli" not in func.__name__  # a mask that is one number keeps everything, in every draw


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws: attention and dropout with probability 0 do not."""
    given = _given(func, args, kwargs)
    if "dropout_p" in (a.name for a in func._schema.arguments):
        return float(given.get("dropout_p") or 0) > 0
    return "dropout" not in func.__name__ or float(given.get("p") or 0) > 0


Seeded = Callable[..., torch.Generator]
"""Gives a generator on a device that begins anew."""


def _fixed(func: Any, args: Any, kwargs: Any, seeded: Seeded) -> Any:
    name = func.__name__.split(".")[0]
    given = _given(func, args, kwargs)
    if name == "native_dropout":
        keep = 1 - given["p"]
        mask = _spread(given["input"], seeded, lambda row, g: _keep(row, keep, g))
        return given["input"] * mask / max(1e-12, keep), mask.bool()
    if name == "multinomial":
        return _multinomial(func, given, seeded)
    out = _once(func, args, kwargs, seeded)
    fill = _FILL.get(name)
    if isinstance(out, torch.Tensor) and fill is not None:
        out.copy_(_spread(out, seeded, lambda row, g: fill(row, given, g)))
    return out


def _once(func: Any, args: Any, kwargs: Any, seeded: Seeded) -> Any:
    if can_be_drawn(func, args, kwargs):
        return drawn(func, args, kwargs, seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded().initial_seed())
        return func(*args, **kwargs)


def _multinomial(func: Any, given: dict[str, Any], seeded: Seeded) -> torch.Tensor:
    """Every row is drawn from its own weights with the same numbers, as if it were alone."""
    weights, others = given["self"], {k: v for k, v in given.items() if k not in {"self", "generator"}}
    rows = weights.reshape(-1, weights.shape[-1])
    found = [func(row, **others, generator=seeded(weights.device)) for row in rows]
    return torch.stack(found).view(*weights.shape[:-1], -1)


def _spread(like: torch.Tensor, seeded: Seeded, fill: Any) -> torch.Tensor:
    """A tensor like another, equal along every dimension but the last; constant if it has only one."""
    dtype = torch.float32 if like.dtype is torch.float64 else like.dtype
    row = torch.empty(like.shape[-1] if like.dim() > 1 else 1, dtype=dtype, device=like.device)
    fill(row, seeded(like.device))
    row = row.to(like.dtype)
    return row.expand(like.shape) if like.dim() else row.reshape(())


def _keep(row: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """A mask; one that would be constant keeps everything, since nothing could be compared behind it."""
    return row.bernoulli_(probability, generator=generator) if row.numel() > 1 else row.fill_(1)


def _bernoulli(row: torch.Tensor, given: dict[str, Any], g: torch.Generator) -> torch.Tensor:
    p = given.get("p", 0.5)
    return _keep(row, p if isinstance(p, float) else 0.5, g)


_FILL: Mapping[str, Any] = {
    "randn": lambda row, given, g: row.normal_(generator=g),
    "randn_like": lambda row, given, g: row.normal_(generator=g),
    "normal_": lambda row, given, g: row.normal_(given.get("mean", 0.0), given.get("std", 1.0), generator=g),
    "rand": lambda row, given, g: row.uniform_(generator=g),
    "rand_like": lambda row, given, g: row.uniform_(generator=g),
    "uniform_": lambda row, given, g: row.uniform_(given.get("from", 0.0), given.get("to", 1.0), generator=g),
    "exponential_": lambda row, given, g: row.exponential_(given.get("lambd", 1.0), generator=g),
    "randint": lambda row, given, g: row.random_(given.get("low", 0), given["high"], generator=g),
    "randint_like": lambda row, given, g: row.random_(given.get("low", 0), given["high"], generator=g),
    "bernoulli_": _bernoulli,
    "bernoulli": _bernoulli,  # what dropout becomes under vmap
}
