"""Telling what autograd wrote into ``p.grad`` from what anything else wrote."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from weakref import ref

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
        this: ref[GradWatch] = ref(self)  # nothing collects a cycle through a hook of a tensor that a graph holds
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(_note, this, name)) for name, p in parameters.items()
        ]
        self.reset()

    def note(self, name: str, p: torch.Tensor) -> None:
        """Autograd has written into the gradient of a parameter."""
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


def _note(watch: ref[GradWatch], name: str, p: torch.Tensor) -> None:
    this = watch()
    if this is not None:
        this.note(name, p)


def _mark(grad: torch.Tensor) -> tuple[int, int]:
    return id(grad), grad._version
