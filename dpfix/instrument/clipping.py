"""Ways to clip: from norms of a sample's gradient to the factors that its parameters are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

EPS = 1e-6
"""Opacus adds it to every norm; see ``DPOptimizer.clip_and_accumulate``."""


MOST_SHOWN = 12
"""Groups that are named."""


@dataclass(frozen=True)
class Scheme:
    """A way to clip, whatever the clip norm C.

    The gradient of a sample is taken apart into groups of parameters, and group ``g`` is multiplied with a factor that makes it
    no longer than its share ``C_g`` of C, where ``sum_g C_g^2 = C^2``. So a sample moves the sum by C at most:

        min(1, C_g / (|g| + 1e-6)), or with a stability constant (automatic clipping, AUTO-S) C_g / (|g| + stability).

    Attributes:
        name: value of ``clipping``.
        groups: what the groups are called, with the names of their parameters; none if all are clipped together.
        shares: the groups' parts of C; the squares add up to 1.
        stability: the stability constant; 0 without one.
    """

    name: str = "flat"
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shares: tuple[float, ...] = (1.0,)
    stability: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether all parameters are clipped together, and short gradients stay as they are."""
        return not self.groups and not self.stability

    @cached_property
    def _group_of(self) -> dict[str, int]:
        return {name: number for number, (_, names) in enumerate(self.groups) for name in names}

    def members(self, names: Sequence[str]) -> list[list[int]]:
        """Which parameters are in which group.

        Args:
            names: of the parameters.

        Returns:
            Their places in ``names``, group by group.
        """
        if not self.groups:
            return [list(range(len(names)))]
        found: list[list[int]] = [[] for _ in self.groups]
        for place, name in enumerate(names):
            found[self._group_of[name]].append(place)
        return found

    def clip_norms(self, clip_norm: float) -> list[float]:
        """The clip norm of every group, of the clip norm of all."""
        return [share * clip_norm for share in self.shares] if self.groups else [clip_norm]

    def factors(self, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
        """What the gradients of a group are multiplied with.

        Args:
            norms: their norms, shape ``[samples]``.
            clip_norm: the group's.

        Returns:
            Shape ``[samples]``.
        """
        if self.stability:
            return clip_norm / (norms + self.stability)
        return (clip_norm / (norms + EPS)).clamp(max=1.0)

    def norms(self, names: Sequence[str], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Norms of per-sample gradients by group.

        Args:
            names: of the parameters.
            gradients: shape ``[samples, *parameter]`` for each.

        Returns:
            Shape ``[samples, groups]``.
        """
        every = [g.reshape(len(g), -1).norm(2, dim=-1).to(gradients[0].device) for g in gradients]
        groups = self.members(names)
        return torch.stack([torch.stack([every[i] for i in of], 1).norm(2, dim=1) for of in groups], 1)

    def clipped_sums(
        self, names: Sequence[str], gradients: Sequence[torch.Tensor], clip_norm: float
    ) -> list[torch.Tensor]:
        """The clipped sum of per-sample gradients that are there.

        Args:
            names: of the parameters.
            gradients: shape ``[samples, *parameter]`` for each.
            clip_norm: C.

        Returns:
            One sum for every parameter.
        """
        norms = self.norms(names, gradients)
        sums: list[torch.Tensor] = [g[:0] for g in gradients]
        for of, found, most in zip(self.members(names), norms.unbind(1), self.clip_norms(clip_norm), strict=True):
            factors = self.factors(found, most)
            for i in of:
                sums[i] = torch.einsum("i,i...", factors.to(gradients[i]), gradients[i])
        return sums

    def words(self) -> str:
        """The way to clip in words, for the clip norm C that stands beside it."""
        if self.stability:
            return f"{self.name}: the gradient g of a sample becomes C g / (|g| + {self.stability:g})"
        if not self.groups:
            return self.name
        each = [f"`{called}` {share:.6g} C" for (called, _), share in zip(self.groups, self.shares, strict=True)]
        shown = each if len(each) <= MOST_SHOWN else [*each[: MOST_SHOWN - 1], f"{len(each) - MOST_SHOWN + 1} more"]
        return f"{self.name}, in all C, which the noise is a multiple of: {', '.join(shown)}"


FLAT = Scheme()
"""All parameters together, as Abadi et al. 2016, https://arxiv.org/abs/1607.00133, have it."""


def grouped(name: str, groups: Sequence[tuple[str, Sequence[str], float]]) -> Scheme:
    """Groups of parameters that are clipped apart.

    Args:
        name: value of ``clipping``.
        groups: what each is called, the names of its parameters and its clip norm.

    Returns:
        The scheme; its clip norm is :func:`together` of theirs.
    """
    most = together([norm for *_, norm in groups])
    return Scheme(
        name, tuple((called, tuple(names)) for called, names, _ in groups), tuple(n / most for *_, n in groups)
    )


def together(clip_norms: Sequence[float]) -> float:
    """How far a sample moves the sum whose groups of parameters have these clip norms: the root of the sum of squares."""
    return math.hypot(*clip_norms)
