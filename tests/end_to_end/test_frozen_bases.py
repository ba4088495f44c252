"""Adapters on frozen bases: in half precision, quantised, compiled, checkpointed; each step against batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpfix
from tests.helpers import one_step

D, T, B, WORDS = 12, 5, 6, 20


class Quantised(nn.Module):
    """A frozen linear layer of whole numbers and a scale per output, as quantisation packages have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class QuantisedParameter(nn.Module):
    """The same with the whole numbers in a parameter that takes no gradient, and a multiplication of its own."""

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            ctx.save_for_backward(weight, scale)
            return x @ (weight.to(x.dtype) * scale).T

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            weight, scale = ctx.saved_tensors
            return g @ (weight.to(g.dtype) * scale), None, None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.Multiply.apply(x, self.weight, self.scale) + self.bias


class Half(nn.Module):
    """A frozen linear layer in bfloat16, between activations in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.bfloat16)).to(x.dtype)


def frozen(linear: nn.Linear) -> nn.Module:
    return linear.requires_grad_(False)


class LoRA(nn.Module):
    """A low-rank update of a frozen layer; with ``magnitude`` (DoRA) each output's weight has a length of its own."""

    def __init__(self, base: nn.Module, magnitude: bool = False) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(D, 3, bias=False), nn.Linear(3, D, bias=False)
        self.magnitude = nn.Parameter(1 + torch.rand(D)) if magnitude else None

    def forward(self, x: Tensor) -> Tensor:
        base, update = self.base(x), 2 * self.b(self.a(x))
        if self.magnitude is None:
            return base + update
        eye = torch.eye(D, dtype=x.dtype)
        whole = self.base(eye) - self.base(torch.zeros_like(eye)) + 2 * self.b(self.a(eye))
        scale = (self.magnitude / whole.T.norm(dim=1).detach())[None]
        return base + (scale - 1) * (base - self.base(torch.zeros_like(x))) + scale * update


class Block(nn.Module):
    def __init__(self, base: Callable[[nn.Linear], nn.Module], magnitude: bool) -> None:
        super().__init__()
        self.q, self.v = (LoRA(base(nn.Linear(D, D)), magnitude) for _ in range(2))
        self.k, self.feed = (base(nn.Linear(D, D)) for _ in range(2))
        self.norm = nn.LayerNorm(D).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.feed(torch.tanh(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))))


class Model(nn.Module):
    """Words, two blocks and a head that is trained."""

    def __init__(
        self, base: Callable[[nn.Linear], nn.Module] = frozen, magnitude: bool = False, repeat: bool = False
    ) -> None:
        super().__init__()
        self.repeat, self.words = repeat, nn.Embedding(WORDS, D).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(base, magnitude) for _ in range(2)])
        self.head = nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.repeat:
            x = x.detach().requires_grad_(self.training)  # as enable_input_require_grads does
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.repeat else block(x)  # type: ignore[assignment]
        return self.head(x.mean(1))


class Prompted(nn.Module):
    """Prompt tuning: learnt vectors, looked up by numbers that are the same for all samples, in front of the words."""

    def __init__(self, looked_up: str = "embedding", repeat: bool = False) -> None:
        super().__init__()
        self.model = Model(repeat=False).requires_grad_(False)
        self.looked_up, self.repeat = looked_up, repeat
        self.prompt = nn.Embedding(3, D) if looked_up != "parameter" else nn.Parameter(torch.randn(3, D))
        self.encoder = (
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) if looked_up == "encoder" else nn.Identity()
        )
        self.register_buffer("numbers", torch.arange(3))

    def prompts(self, batch: int) -> Tensor:
        prompt: Any = self.prompt
        if self.looked_up == "parameter":
            return prompt.unsqueeze(0).expand(batch, -1, -1)
        numbers: Any = self.numbers
        return self.encoder(prompt(numbers.unsqueeze(0).expand(batch, -1)))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompts(len(ids)), self.model.words(ids)], 1)
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.repeat else block(x)  # type: ignore[assignment]
        return self.model.head(x.mean(1))


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(0)), torch.arange(B) % 3


BASES = {"frozen": frozen, "bfloat16": Half, "int8 buffer": Quantised, "int8 parameter": QuantisedParameter}


@pytest.mark.parametrize("repeat", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("base", BASES)
def test_adapters_on_a_frozen_base(base: str, magnitude: bool, repeat: bool) -> None:
    torch.manual_seed(0)
    error, training = one_step(Model(BASES[base], magnitude, repeat), *words())
    # a function without setup_context does not run under vmap, and lengths of weights are made there
    assert training.plan.engine != "microbatch" or (base == "int8 parameter" and magnitude)
    assert error < (2e-2 if base == "bfloat16" else 1e-4)


@pytest.mark.parametrize("repeat", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("kind", ["embedding", "parameter", "encoder"])
def test_prompts_that_are_learnt(kind: str, repeat: bool) -> None:
    torch.manual_seed(0)
    error, training = one_step(Prompted(kind, repeat), *words())
    assert training.plan.engine in {"bookkeeping", "vmap"}
    assert error < 1e-4


@pytest.mark.parametrize("what", ["frozen layer", "trained block"])
def test_a_part_that_was_wrapped_by_the_compiler_is_refused_with_a_way_out(what: str) -> None:
    model = Model()
    if what == "frozen layer":
        model.blocks[0].feed = torch.compile(model.blocks[0].feed, backend="eager")  # type: ignore[union-attr, assignment]
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    with pytest.raises(dpfix.ModelError, match=r"OptimizedModule made by torch.compile[\s\S]*compile after training"):
        one_step(model, *words())


@pytest.mark.filterwarnings("ignore")  # of the compiler, about tensors that it looks at itself
def test_a_part_that_is_compiled_in_place_is_right() -> None:
    torch.manual_seed(0)
    model = Model()
    part: Any = model.blocks[0].feed
    part.compile(backend="eager")
    error, training = one_step(model, *words())
    assert training.plan.engine != "microbatch"
    assert error < 1e-4
