"""Whether two modules compute the same function: compared layer by layer, not by counting keys."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dpfix.errors import ArgumentError
from dpfix.instrument import pytree
from dpfix.instrument.rng import rng_untouched
from dpfix.weights.copies import plain_copy, unwrap
from dpfix.weights.outputs import Difference, compare_leaves

MODES = ("eval", "train")


@dataclass(frozen=True)
class EquivalenceReport:
    """What :func:`verify_equivalence` found. True in a boolean context if the outputs agree.

    Attributes:
        equal: whether all outputs of the models agree within the tolerance, in every mode.
        max_difference: largest absolute difference of the outputs; infinite if they cannot be compared.
        first: the first layer, in the order of execution, that parts; ``None`` if no layer does. Layers can part
            although the outputs agree: behind a weight of zero, or when a name is used for different work.
        layers: number of layer calls that were compared.
        modes: the modes that were run.
        dtype: ``"float64"`` if the comparison ran in double precision, else ``"as given"``.
        randomised: whether the weights were drawn anew.
        atol: absolute tolerance.
        rtol: tolerance relative to ``a``'s value.
    """

    equal: bool
    max_difference: float
    first: Difference | None
    layers: int
    modes: tuple[str, ...]
    dtype: str
    randomised: bool
    atol: float
    rtol: float

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        how = f"{' and '.join(self.modes)}, dtype {self.dtype}{', weights drawn anew' if self.randomised else ''}"
        told = "equal" if self.equal else "not equal"
        lines = [
            f"{told}: largest difference of the outputs {self.max_difference:.2e} ({how}, {self.layers} layer calls)"
        ]
        if self.first is not None:
            note = "" if not self.equal else " (the outputs agree all the same)"
            lines.append(f"  first parts at {self.first}{note}")
        return "\n".join(lines)


@dataclass
class _Trace:
    """Outputs of one run: of the layers in the order in which they finish, and of the model."""

    layers: list[tuple[str, int, Any]] = field(default_factory=list)
    output: Any = None


def verify_equivalence(
    a: nn.Module,
    b: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    atol: float = 1e-6,
    rtol: float = 1e-5,
    mapping: Mapping[str, str] | None = None,
    randomise: bool | Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] = False,
    float64: bool = False,
    modes: tuple[str, ...] = MODES,
    method: str = "forward",
) -> EquivalenceReport:
    """Compare two modules layer by layer and name the first place where they part.

    Both are copied, so the given objects, their weights and every generator stay as they are. Random numbers are
    seeded anew before and after every layer that is compared, by its name, so that dropout and ``randn_like`` draw the
    same in both although they may draw in another order. ``"train"`` keeps the training flags of a module that is in
    training mode (a BatchNorm in ``eval()`` stays there).

    Args:
        a: the module that is right.
        b: the one to compare with it; wrappers of Opacus, ``torch.compile`` and data-parallel ones are taken off.
        inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        seed: of the random numbers, and of the weights if they are drawn.
        atol: absolute tolerance.
        rtol: tolerance relative to ``a``'s value.
        mapping: module paths of ``a`` to those of ``b``; by default all paths that both have.
        randomise: draw all weights anew first, because a weight that is zero hides what lies behind it. With ``True``
            ``b`` must have the state-dict keys of ``a``; otherwise a function from ``a``'s state dict to ``b``'s.
        float64: compare in double precision.
        modes: any of ``"eval"`` and ``"train"``.
        method: what is called, ``"forward"`` or another method (``"encode"``).

    Returns:
        The report.

    Raises:
        ArgumentError: a mode or a path of ``mapping`` does not exist, or the weights cannot be drawn for both.
    """
    a, b = plain_copy(unwrap(a)), plain_copy(unwrap(b))
    _check(a, b, mapping, modes)
    if float64:
        a, b = a.double(), b.double()
        inputs = pytree.map_leaves(_double, inputs)
    if randomise:
        _randomise(a, b, seed, None if randomise is True else randomise)
    paths = _common(a, b) if mapping is None else dict(mapping)
    found: list[Difference] = []
    outputs: list[tuple[bool, float]] = []
    layers = 0
    for mode in modes:
        with rng_untouched(), torch.no_grad():
            first = _run(a, inputs, {path: path for path in paths}, mode, seed, method)
            second = _run(b, inputs, {other: path for path, other in paths.items()}, mode, seed, method)
        layers += len(first.layers)
        found += _parted(first, second, paths, mode, atol, rtol)
        whole = list(compare_leaves(first.output, second.output, atol, rtol))
        found += [replace(d, mode=mode) for equal, d in whole if not equal]
        outputs += [(equal, d.size) for equal, d in whole]
    return EquivalenceReport(
        equal=all(equal for equal, _ in outputs),
        max_difference=max((size for _, size in outputs), default=0.0),
        first=found[0] if found else None,
        layers=layers,
        modes=tuple(modes),
        dtype="float64" if float64 else "as given",
        randomised=bool(randomise),
        atol=atol,
        rtol=rtol,
    )


def draw_weights(
    state: Mapping[str, torch.Tensor], seed: int, constant: frozenset[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """New values for a state dict, none of them zero by design and of a size that keeps activations near one.

    Args:
        state: tensors by key.
        seed: a key's values depend on the seed, the key and the shape alone.
        constant: keys to leave as they are; integer and boolean tensors always are.

    Returns:
        A new mapping with the same keys.
    """
    return {key: value if key in constant else _draw(key, value, seed) for key, value in state.items()}


def _draw(key: str, value: torch.Tensor, seed: int) -> torch.Tensor:
    if not value.is_floating_point():
        return value.clone()
    drawn = torch.from_numpy(np.random.Generator(np.random.PCG64(_number(seed, key))).standard_normal(value.shape))
    if value.dim() > 1:
        drawn = drawn / math.sqrt(max(1, value[0].numel()))
    elif key.endswith("weight"):
        drawn = 1 + 0.2 * drawn
    elif "var" in key.rpartition(".")[2]:
        drawn = 1 + drawn.abs()
    else:
        drawn = 0.2 * drawn
    return drawn.to(value)


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _check(a: nn.Module, b: nn.Module, mapping: Mapping[str, str] | None, modes: tuple[str, ...]) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ArgumentError(f"modes={modes!r}: use one or both of {', '.join(map(repr, MODES))}.", path="modes")
    for name, model, paths in (("a", a, (mapping or {}).keys()), ("b", b, (mapping or {}).values())):
        there = dict(model.named_modules(remove_duplicate=False))
        missing = [path for path in paths if path not in there]
        if missing:
            raise ArgumentError(
                f"mapping names {missing[0]!r}, and {name} ({type(model).__name__}) has no such module.", path="mapping"
            )


def _common(a: nn.Module, b: nn.Module) -> dict[str, str]:
    there = {path for path, _ in b.named_modules()}
    return {path: path for path, _ in a.named_modules() if path in there}


def _double(_: pytree.Path, leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _randomise(
    a: nn.Module,
    b: nn.Module,
    seed: int,
    convert: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None,
) -> None:
    buffers = frozenset(name for name, _ in a.named_buffers())
    drawn = draw_weights(a.state_dict(), seed, buffers)
    a.load_state_dict(drawn)
    try:
        b.load_state_dict(drawn if convert is None else convert(dict(drawn)))
    except RuntimeError as error:
        raise ArgumentError(
            f"randomise=True needs the same state-dict keys in both modules: {error}",
            help="Pass a function from a's state dict to b's as randomise.",
            path="randomise",
        ) from error


# ------------------------------------------------------------------ running


def _run(model: nn.Module, inputs: Any, names: Mapping[str, str], mode: str, seed: int, method: str) -> _Trace:
    """One pass; ``names`` are the layers to record, each with the name by which its random numbers are seeded."""
    model = plain_copy(model)
    if mode == "eval" or not model.training:
        model.train(mode == "train")
    trace = _Trace()
    with _recording(model, names, trace, seed):
        _reseed(seed, "", 0)
        trace.output = _snapshot(_call(getattr(model, method), inputs))
    return trace


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    inputs = pytree.map_leaves(lambda _, x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)


@contextmanager
def _recording(model: nn.Module, names: Mapping[str, str], trace: _Trace, seed: int) -> Iterator[None]:
    calls: dict[str, int] = {}

    def enter(name: str, module: nn.Module, args: Any) -> None:
        _reseed(seed, name, calls.get(name, 0))

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        number = calls.get(name, 0)
        calls[name] = number + 1
        trace.layers.append((name, number, _snapshot(output)))
        _reseed(seed, name, number, "after")

    handles = []
    for path, name in names.items():
        if path:  # the model itself is compared as a whole
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(enter, name), prepend=True))
            handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reseed(*parts: object) -> None:
    number = _number(*parts)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def _snapshot(output: Any) -> Any:
    """Copies of the tensors of an output: a later layer may change them in place."""

    def keep(_: pytree.Path, leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return {"data": leaf.data.clone(), "batch_sizes": leaf.batch_sizes.clone()}
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    return dict(pytree.leaves(pytree.map_leaves(keep, output)))


# ------------------------------------------------------------------ comparing


def _parted(
    first: _Trace, second: _Trace, paths: Mapping[str, str], mode: str, atol: float, rtol: float
) -> list[Difference]:
    others = {(name, number): output for name, number, output in second.layers}
    for name, number, output in first.layers:
        call = {"path": name, "other_path": paths[name], "mode": mode, "call": number}
        if (name, number) not in others:
            called = sum(other == name for other, _ in others)
            return [
                Difference(**call, output="", size=math.inf, scale=0.0, reason=f"called {called} times in the other")
            ]
        for equal, difference in compare_leaves(output, others[name, number], atol, rtol):
            if not equal:
                return [replace(difference, **call)]
    return []
