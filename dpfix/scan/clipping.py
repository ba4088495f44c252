"""How a call asks to clip, and what follows for the parameters of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dpfix.errors import ArgumentError
from dpfix.instrument.clipping import FLAT, Scheme, grouped, together
from dpfix.scan.options import PrivacyOptions
from dpfix.scan.request import Request
from dpfix.scan.values import number, shown

CLIPPING = ("flat", "per_layer", "per_group", "automatic", "adaptive")
"""Legal values of ``clipping``."""
STABILITY = 0.01
"""The stability constant of Bu et al. 2023, https://arxiv.org/abs/2206.07136."""
OPACUS = ("flat", "per_layer", "adaptive")
"""Those that Opacus has an optimizer of its own for."""


def check_clip_norm(privacy: PrivacyOptions, module: nn.Module) -> None:
    """The clip norm, or all of them, have to be positive numbers, and to go with the way to clip.

    Raises:
        ArgumentError: one does not.
    """
    value, clipping = privacy.max_grad_norm, privacy.clipping
    several = isinstance(value, (list, tuple, Mapping))
    given = list(value.values()) if isinstance(value, Mapping) else list(value) if several else [value]
    values = [number(v) for v in given]
    if not values or not all(v is not None and v > 0 for v in values):
        raise ArgumentError(
            f"max_grad_norm={shown(value)} must be a positive finite number (or a list of them for clipping='per_layer', a "
            "dictionary for 'per_group'):",
            "the largest Euclidean norm a sample's gradient keeps.",
            path="max_grad_norm",
        )
    _check_stability(privacy)
    if (clipping == "per_group") != isinstance(value, Mapping):
        raise ArgumentError(
            f"max_grad_norm={shown(value)} with clipping={clipping!r}:",
            "clip norms by the names of parameters belong to clipping='per_group', which needs them.",
            "Pass for example clipping='per_group', max_grad_norm={'encoder.*': 0.5, '*': 1.0}.",
            path="max_grad_norm",
        )
    if clipping == "per_group":
        list(_groups(value, [name for name, p in module.named_parameters() if p.requires_grad]))
        return
    trainable = sum(p.requires_grad for p in module.parameters())
    per_layer = clipping == "per_layer"
    if per_layer != several or (per_layer and len(values) != trainable):
        raise ArgumentError(
            f"max_grad_norm has {len(values)} value(s) for clipping='{clipping}' and {trainable} trainable parameters.",
            help="Pass one number for flat, automatic or adaptive clipping, and one number per trainable parameter, in the order "
            "of module.parameters(), for clipping='per_layer'.",
            path="max_grad_norm",
        )


SMALLEST_STABILITY = 1e-12
"""A gradient whose norm comes out as zero, since its squares underflow in single precision, is shorter than 1e-15."""


def _check_stability(privacy: PrivacyOptions) -> None:
    value = privacy.stability_constant
    if value is None:
        return
    if privacy.clipping != "automatic":
        raise ArgumentError(
            f"stability_constant={shown(value)} with clipping={privacy.clipping!r}:",
            "it belongs to clipping='automatic'.",
            "Leave it out.",
            path="stability_constant",
        )
    if (found := number(value)) is None or found < SMALLEST_STABILITY:
        raise ArgumentError(
            f"stability_constant={shown(value)} must be a finite number of at least {SMALLEST_STABILITY:g}:",
            "without it a gradient of zero, or one whose squares are too small for single precision, would be divided by zero.",
            f"Leave it out for {STABILITY}.",
            path="stability_constant",
        )


def _groups(norms: Mapping[Any, Any], names: list[str]) -> Iterator[tuple[str, list[str], float]]:
    """The groups that patterns make of parameters: the first pattern that a name matches has it.

    Yields:
        Pattern, names and clip norm.

    Raises:
        ArgumentError: a pattern has none, or a parameter matches none.
    """
    left = list(names)
    for pattern, norm in norms.items():
        own = [name for name in left if isinstance(pattern, str) and fnmatchcase(name, pattern)]
        if not own:
            others = [name for name in names if isinstance(pattern, str) and fnmatchcase(name, pattern)]
            raise ArgumentError(
                f"max_grad_norm: no trainable parameter belongs to {shown(pattern)}.",
                f"All that match it ({', '.join(others[:3])}) match an earlier pattern."
                if others
                else "No name matches it.",
                f"Names are those of module.named_parameters(), for example {names[0] if names else 'none'!r}; '*' is any "
                "characters.",
                path="max_grad_norm",
            )
        left = [name for name in left if name not in own]
        yield pattern, own, float(norm)
    if left:
        raise ArgumentError(
            f"max_grad_norm: parameter `{left[0]}` belongs to no group ({len(left)} parameter(s)).",
            "Its gradient would have no bound.",
            "Add a pattern for it; '*' as the last one takes all others.",
            path="max_grad_norm",
        )


def by_parameter(request: Request) -> Request:
    """The call with clip norms of layers by the names of their parameters: a repair may change the order.

    Args:
        request: the call, whose values are checked.

    Returns:
        The same call.
    """
    privacy = request.privacy
    if not isinstance(privacy.max_grad_norm, (list, tuple)):
        return request
    names = [name for name, p in request.module.named_parameters() if p.requires_grad]
    return replace(
        request, privacy=replace(privacy, max_grad_norm=dict(zip(names, privacy.max_grad_norm, strict=True)))
    )


def scheme_of(request: Request, frozen: tuple[str, ...] = ()) -> Scheme:
    """The way to clip.

    Args:
        request: the call, whose values are checked.
        frozen: parameters that are not trained after all; what was theirs is nobody's.

    Returns:
        The scheme.

    Raises:
        ArgumentError: a repair has given the model parameters that no clip norm was given for.
    """
    privacy, module = request.privacy, request.module
    if privacy.clipping == "automatic":
        return Scheme(
            "automatic", stability=STABILITY if privacy.stability_constant is None else privacy.stability_constant
        )
    if not isinstance(privacy.max_grad_norm, Mapping):
        return Scheme(privacy.clipping) if privacy.clipping != "flat" else FLAT
    names = [name for name, p in module.named_parameters() if p.requires_grad or name in frozen]
    if privacy.clipping == "per_layer":
        norms = {name: privacy.max_grad_norm[name] for name in names if name in privacy.max_grad_norm}
        if len(norms) < len(names):
            raise ArgumentError(
                "max_grad_norm has one clip norm for every parameter, and a repair has given the model others:",
                f"`{next(name for name in names if name not in norms)}` is new.",
                "Repair the model first (dpfix.diagnose says how), or pass clipping='per_group' with patterns of names.",
                path="max_grad_norm",
            )
        every = [(name, [name], norms[name]) for name in _as_stepped(request) if name in norms]
    else:
        every = list(_groups(privacy.max_grad_norm, names))
    trained = [(called, [n for n in own if n not in frozen], norm) for called, own, norm in every]
    return grouped(privacy.clipping, [group for group in trained if group[1]])


def for_opacus(request: Request, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """What Opacus is told: the clip norm of all parameters, or one for each in the order of the optimizer, and a way to clip.

    Args:
        frozen: parameters that are not trained after all.

    Returns:
        Arguments of ``make_private``.
    """
    norms, clipping = request.privacy.max_grad_norm, request.privacy.clipping
    if isinstance(norms, Mapping):
        each = [float(norms[called]) for called, _ in scheme_of(request, frozen).groups]
        norms = each if clipping == "per_layer" else together(each)
    return {"max_grad_norm": norms, "clipping": opacus_clipping(clipping)}


def _as_stepped(request: Request) -> list[str]:
    """Names of the parameters in the order in which Opacus's optimizer has them."""
    names = {id(p): name for name, p in request.module.named_parameters()}
    return [names[id(p)] for group in request.optimizer.param_groups for p in group["params"] if id(p) in names]


def opacus_clipping(clipping: str) -> str:
    """What Opacus is told: it has one optimizer for all ways to clip with one number, and dpfix clips."""
    return clipping if clipping in OPACUS else "flat"
