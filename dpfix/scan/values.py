"""Plain values from what a call is given: one number in a tensor is a number, a boolean is a boolean, and nothing else is.

A value that is taken for another one changes what is released without a trace: ``poisson_sampling=None`` would turn Poisson
sampling off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from dpfix.errors import USER_CODE_ERRORS, ArgumentError
from dpfix.sampling.rate import BY_CHANCE
from dpfix.scan.options import PerformanceOptions, PrivacyOptions


def plain(value: Any) -> Any:
    """The Python value in a tensor, an array or a scalar of NumPy that holds one; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.item() if value.size == 1 else value
    return value


def truth(name: str, value: Any) -> bool:
    """A boolean.

    Args:
        name: the argument.
        value: what was given.

    Returns:
        ``True`` or ``False``.

    Raises:
        ArgumentError: it is neither.
    """
    given = plain(value)
    if isinstance(given, bool):
        return given
    raise ArgumentError(
        f"{name}={shown(value)} is neither True nor False.",
        help=f"Pass {name}=True or {name}=False, or leave it out.",
        path=name,
    )


def number(value: Any) -> float | None:
    """A number.

    Args:
        value: what was given.

    Returns:
        A Python number; ``None`` if it is none, is NaN, infinite, or too large for a float. A boolean is no number.
    """
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Real):
        return None
    try:
        found = given if type(given) is int else float(given)
        return found if abs(float(found)) < float("inf") else None
    except OverflowError:
        return None


def number_in(name: str, value: Any, legal: tuple[float, float], help: str, *, open_at: str = "") -> float:
    """A number between two others.

    Args:
        name: the argument.
        value: what was given.
        legal: the smallest and the largest that it may be.
        help: what to pass.
        open_at: ``"low"``, ``"high"`` or both: ends that it may not be.

    Returns:
        The number.

    Raises:
        ArgumentError: it is none, or is not between them.
    """
    found, (low, high) = number(value), legal
    inside = found is not None and low <= found <= high
    inside = inside and not ("low" in open_at and found == low) and not ("high" in open_at and found == high)
    if found is not None and inside:
        return found
    ends = f"above {low:g}" if "low" in open_at else f"from {low:g}"
    if high < float("inf"):
        ends += f" and below {high:g}" if "high" in open_at else f" to {high:g}"
    raise ArgumentError(f"{name}={shown(value)} must be a finite number {ends}.", help=help, path=name)


def shown(value: Any) -> str:
    """A value for a message, not too long."""
    try:
        text = repr(value)
    except USER_CODE_ERRORS:  # a whole number of more than 4300 digits, a half-made object
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def plain_privacy(privacy: PrivacyOptions) -> PrivacyOptions:
    """The options with plain values; what is no number is left for the checks to name, and a boolean has to be one."""
    norms, seed = privacy.max_grad_norm, plain(privacy.seed)
    if isinstance(norms, Mapping):
        norms = {name: _number_or_as_given(norm) for name, norm in norms.items()}
    if isinstance(norms, (torch.Tensor, np.ndarray)):
        norms = norms.tolist() if number(norms) is None else norms
    if isinstance(norms, (list, tuple)):
        norms = [_number_or_as_given(norm) for norm in norms]
    poisson = truth("poisson_sampling", privacy.poisson_sampling)
    sampling = privacy.sampling if privacy.sampling is not None else "poisson" if poisson else "fixed"
    if not poisson and isinstance(sampling, str) and sampling in BY_CHANCE:
        raise ArgumentError(
            f"sampling={sampling!r} with poisson_sampling=False:",
            "the one draws every sample by chance, the other says that nothing is.",
            "Leave out poisson_sampling.",
            path="sampling",
        )
    return replace(
        privacy,
        poisson_sampling=sampling != "fixed",
        sampling=sampling,
        max_grad_norm=norms if isinstance(norms, (list, dict)) else _number_or_as_given(norms),
        stability_constant=_number_or_as_given(privacy.stability_constant),
        checks=_number_or_as_given(privacy.checks),
        strict=truth("strict", privacy.strict),
        seed=int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else seed,
    )


def plain_performance(performance: PerformanceOptions) -> PerformanceOptions:
    """The options with plain values; a boolean has to be one."""
    names = ("batch_first", "no_grad_regions", "cache")
    most = _samples_together(performance.max_physical_batch_size)
    truths = {name: truth(name, getattr(performance, name)) for name in names}
    return replace(performance, max_physical_batch_size=most, **truths)


def _samples_together(value: Any) -> int | str | None:
    given = plain(value)
    if given is None or (isinstance(given, str) and given == "auto"):
        return given
    if isinstance(given, Integral) and not isinstance(given, bool) and int(given) > 0:
        return int(given)
    raise ArgumentError(
        f"max_physical_batch_size={shown(value)} is neither a whole number above 0 nor 'auto'.",
        help="Pass how many samples fit into memory at a time, 'auto' to have that estimated, or leave it out.",
        path="max_physical_batch_size",
    )


def _number_or_as_given(value: Any) -> Any:
    found = number(value)
    return value if found is None else found


ADAPTIVE: Mapping[str, tuple[float, float, str]] = {
    "target_unclipped_quantile": (0.0, 1.0, ""),
    "clipbound_learning_rate": (0.0, float("inf"), ""),
    "max_clipbound": (0.0, float("inf"), "low"),
    "min_clipbound": (0.0, float("inf"), "low"),
    "unclipped_num_std": (0.0, float("inf"), "low"),
}
"""What adaptive clipping needs: the smallest and the largest legal value, and which of them is not legal itself."""


def plain_options(clipping: str, noise_multiplier: float, given: Mapping[str, Any]) -> dict[str, Any]:
    """Further options of Opacus's optimizers, as plain numbers.

    Args:
        clipping: the clipping scheme.
        noise_multiplier: of the call; 0 where it is not known yet.
        given: options by name.

    Returns:
        The options.

    Raises:
        ArgumentError: one is missing, no number, or does not go with the others.
    """
    options = dict(given)
    if clipping != "adaptive":
        return options
    missing = [name for name in ADAPTIVE if name not in options]
    if missing:
        raise ArgumentError(
            f"clipping='adaptive' is missing {', '.join(missing)}.",
            "They say how the clip norm follows the noisy share of samples that it leaves unclipped.",
            "Pass for example target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=10.0, "
            "min_clipbound=0.01, unclipped_num_std=batch_size / 20.",
            path=missing[0],
        )
    for name, (low, high, open_at) in ADAPTIVE.items():
        options[name] = number_in(
            name, options[name], (low, high), "See Andrew et al. 2021, arXiv 1905.03871.", open_at=open_at
        )
    if options["max_clipbound"] <= options["min_clipbound"]:
        raise ArgumentError(
            f"max_clipbound={options['max_clipbound']} must be larger than min_clipbound={options['min_clipbound']}.",
            path="max_clipbound",
        )
    if noise_multiplier >= 2 * options["unclipped_num_std"]:
        raise ArgumentError(
            f"unclipped_num_std={options['unclipped_num_std']} must be more than half of noise_multiplier={noise_multiplier}:",
            "the count of unclipped samples shares the budget (theorem 1 of Andrew et al. 2021, arXiv 1905.03871).",
            "Raise unclipped_num_std.",
            path="unclipped_num_std",
        )
    return options
