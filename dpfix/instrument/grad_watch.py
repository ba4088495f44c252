"""Telling what autograd wrote into ``p.grad`` from what anything else wrote."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class GradWatch:
    """Knows what autograd itself accumulated into ``p.grad``, so that everything else can be told apart.

    Attributes:
        arrived: names of parameters that autograd accumulated into since the last :meth:`reset`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.arrived: list[str] = []
        self._seen: dict[str, tuple[int, int]] = {}
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._note(name, p))
            for name, p in parameters.items()
        ]
        self.reset()

    def _note(self, name: str, p: torch.Tensor) -> None:
        self.arrived.append(name)
        if p.grad is not None:
            self._seen[name] = _mark(p.grad)

    def reset(self) -> None:
        """Take the present gradients as known."""
        self.arrived.clear()
        self._seen = {name: _mark(grad) for name, p in self.parameters.items() if (grad := p.grad) is not None}

    def edited(self) -> list[str]:
        """Parameters whose gradient was changed by something other than autograd.

        Returns:
            Their names.
        """
        items, seen = self.parameters.items(), self._seen
        return [n for n, p in items if (grad := p.grad) is not None and _mark(grad) != seen.get(n)]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _mark(grad: torch.Tensor) -> tuple[int, int]:
    return id(grad), grad._version
