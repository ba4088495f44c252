"""What a layer costs in a step: operations, memory and messages of an ordinary one, of book-keeping, of per-sample gradients.

An operation is an addition or a multiplication in a product of matrices (FLOP), as ``torch.utils.flop_counter`` counts them.
Everything is for one sample, unless it says otherwise. When book-keeping keeps gradients is read from the engine's constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from dpfix.engines.bookkeeping.linear import BYTE_COST, KEEP_RATIO, gram_cost

FLOAT, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""

Way = Literal["kept", "Gram", "factors"]
"""How book-keeping has the norm of a weight's gradient: the gradient is kept; from Gram matrices of its two factors; for one
position, from the norms of the factors."""


@dataclass(frozen=True)
class Cost:
    """What a layer adds to a step, for one sample.

    Attributes:
        forward: operations of the layer's output.
        inputs: operations of its input's gradient.
        weights: operations of its weight's gradient, in an ordinary step.
        norms: operations of the norms, in book-keeping.
        sums: operations of the clipped sum, in book-keeping.
        held: bytes that book-keeping holds until the norms of all layers are known, in float32.
        single: bytes of the per-sample gradient.
        read: bytes that book-keeping reads and writes beyond an ordinary step, with copies of bfloat16 in float32.
    """

    forward: float = 0
    inputs: float = 0
    weights: float = 0
    norms: float = 0
    sums: float = 0
    held: float = 0
    single: float = 0
    read: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(Cost)))

    @property
    def ordinary(self) -> float:
        """Operations of an ordinary step."""
        return self.forward + self.inputs + self.weights

    @property
    def bookkeeping(self) -> float:
        """Operations of a step of book-keeping."""
        return self.forward + self.inputs + self.norms + self.sums


def way(positions: int, wide: int, high: int) -> Way:
    """Which way book-keeping takes to the norm of a product's weight gradient."""
    small = wide * high <= KEEP_RATIO * positions * (wide + high)
    if small and gram_cost(positions, wide, high) > 3 * BYTE_COST * wide * high:
        return "kept"
    return "factors" if positions == 1 else "Gram"


def product(positions: int, wide: int, high: int, *, trained: bool = True, inputs: bool = True) -> Cost:
    """``nn.Linear`` on so many positions; a convolution is one whose inputs are its patches.

    Args:
        wide: numbers in a row of the input.
        high: numbers in a row of the output.
        trained: whether the weight is.
        inputs: whether the input needs a gradient.
    """
    once, size, factors = 2 * positions * wide * high, FLOAT * wide * high, FLOAT * positions * (wide + high)
    passes = Cost(forward=once, inputs=once if inputs else 0)
    if not trained:
        return passes
    norms, sums, held, read = {
        "kept": (once, 2 * wide * high, size, 1.5 * factors + 3 * size),
        "Gram": (2 * positions**2 * (wide + high), once, factors, 2.5 * factors + 6 * FLOAT * positions**2),
        "factors": (0, once, factors, 2.5 * factors),
    }[way(positions, wide, high)]
    return passes + Cost(weights=once, norms=norms, sums=sums, held=held, single=size, read=read)


def lookup(positions: int, rows: int, wide: int) -> Cost:
    """``nn.Embedding``: no products; norms and sum go over the places where a token stands."""
    factors = FLOAT * positions * wide
    return Cost(held=factors, single=FLOAT * rows * wide, read=2.5 * factors)


def scale(positions: int, wide: int, *, shift: bool = False) -> Cost:
    """A normalisation's scale, and its shift: one number per feature and sample is kept."""
    kept = FLOAT * wide * (1 + shift)
    return Cost(held=kept, single=kept, read=3 * kept)


def attention(positions: int, wide: int) -> Cost:
    """Causal attention in one kernel, which has no parameters and costs the same either way."""
    forward = 2 * positions**2 * wide
    return Cost(forward=forward, inputs=2.5 * forward)


# ------------------------------------------------------------------ models


@dataclass(frozen=True)
class Llama:
    """A decoder with gated layers.

    Attributes:
        width: numbers per token.
        hidden: numbers inside a gated layer.
        keys: numbers of a token's key.
        rank: of the LoRA adapters on every product of the blocks; 0 trains everything.
    """

    name: str
    layers: int
    width: int
    hidden: int
    keys: int
    words: int = 32_000
    rank: int = 0

    @property
    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the products in a block."""
        d, f, k = self.width, self.hidden, self.keys
        return [(d, d), (d, k), (d, k), (d, d), (d, f), (d, f), (f, d)]

    @property
    def numbers(self) -> int:
        """All parameters, without adapters."""
        block = sum(wide * high for wide, high in self.products) + 2 * self.width
        return self.layers * block + 2 * self.words * self.width + self.width

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        adapters = self.layers * sum(self.rank * (wide + high) for wide, high in self.products)
        return adapters if self.rank else self.numbers

    @property
    def tensors(self) -> int:
        """Parameters that are trained, as tensors: what a step sends, one message each."""
        return self.layers * 2 * len(self.products) if self.rank else self.layers * (len(self.products) + 2) + 3

    def cost(self, positions: int) -> Cost:
        """Of one sample with so many tokens."""
        return sum(self.parts(positions), Cost())

    def parts(self, positions: int) -> Iterator[Cost]:
        """Of all layers of a kind, kind by kind."""
        full, every = not self.rank, self.layers
        for wide, high in self.products:
            yield product(positions, wide, high, trained=full) * every
            if self.rank:
                yield (product(positions, wide, self.rank) + product(positions, self.rank, high)) * every
        yield attention(positions, self.width) * every
        yield product(positions, self.width, self.words, trained=full)
        if full:
            yield lookup(positions, self.words, self.width)
            yield scale(positions, self.width) * (2 * every + 1)


LLAMAS = (
    Llama("100 M", 12, 768, 2048, 768),
    Llama("1 B", 22, 2048, 5632, 256),
    Llama("7 B", 32, 4096, 11_008, 4096),
    Llama("70 B", 80, 8192, 28_672, 1024),
)
"""The larger ones have the shapes of TinyLlama (arXiv 2401.02385) and Llama 2 (arXiv 2307.09288)."""
