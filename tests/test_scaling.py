"""The cost model behind the page on scaling, against what the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks import scaling_model
from benchmarks.common import cost, tables
from benchmarks.common.models import Transformer
from benchmarks.common.process import products
from dpfix.engines.bookkeeping.contributions import Contribution, Kept
from dpfix.engines.bookkeeping.embedding import Lookup

SAMPLES = 3
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def trained(model: nn.Module, inputs: torch.Tensor, **options: Any) -> tuple[dpfix.PrivateTraining, torch.Tensor]:
    """A training by book-keeping whose loss is the mean of what the model returns for every sample."""
    training = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(inputs), batch_size=SAMPLES),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        training_step=lambda m, batch: m(batch[0]).float().flatten(1).logsumexp(1).mean(),
        poisson_sampling=False,
        grad_sample_mode="bookkeeping",
        cache=False,
        **options,
    )
    one_step(training, inputs)
    training[1].guard.real_steps.agenda.due = lambda seen: False
    return training, inputs


def one_step(training: dpfix.PrivateTraining, inputs: torch.Tensor) -> None:
    training[1].zero_grad()
    training[0](inputs).float().flatten(1).logsumexp(1).mean().backward()
    training[1].step()


def held(training: dpfix.PrivateTraining) -> int:
    """Bytes that book-keeping holds before a step, with those of one memory once for every parameter."""
    total = 0
    for _, found in training[1].guard.guarded.handle._iterations.arrived():
        total += sum(sum(t.nbytes for t in factors(one)) for parts in found.values() for one in parts)
    return total


def factors(part: Contribution) -> list[torch.Tensor]:
    if isinstance(part, Kept):
        return [part.gradients]
    return [part.g] if isinstance(part, Lookup) else [part.a, part.g]  # type: ignore[attr-defined]


LAYERS = {
    "kept": (96, 24, 40),
    "Gram": (12, 96, 160),
    "factors": (1, 96, 160),
}
"""Positions, inputs and outputs of a layer."""


@pytest.mark.parametrize("way", LAYERS)
def test_operations_and_memory_of_a_layer_are_counted(way: str) -> None:
    positions, wide, high = LAYERS[way]
    assert cost.way(positions, wide, high) == way
    model = nn.Sequential(nn.Linear(8, wide, bias=False), nn.Linear(wide, high, bias=False))
    training, inputs = trained(model, torch.randn(SAMPLES, positions, 8))
    first, second = cost.product(positions, 8, wide, inputs=False), cost.product(positions, wide, high)
    whole = (first + second) * SAMPLES
    counted = products(lambda: one_step(training, inputs))
    assert counted == {torch.float32: whole.bookkeeping}
    training[1].zero_grad()
    training[0](inputs).sum().backward()
    assert held(training) == whole.held


def test_the_operations_of_a_transformer_are_predicted_within_a_hundredth() -> None:
    """Torch counts no attention on the CPU, whose cost is the same in both."""
    positions, width, layers, words = 16, 64, 2, 300
    model = Transformer(words, width, layers, positions)
    ids = torch.randint(0, words, (SAMPLES, positions))
    ordinary = products(lambda: model(ids).float().flatten(1).logsumexp(1).mean().backward())
    training, ids = trained(model, ids)
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    whole = sum((cost.product(positions, *size) * layers for size in sizes), cost.product(positions, width, words))
    (plain,), (counted,) = ordinary.values(), products(lambda: one_step(training, ids)).values()
    assert plain == pytest.approx(whole.ordinary * SAMPLES, rel=0.01)
    assert counted == pytest.approx(whole.bookkeeping * SAMPLES, rel=0.01)
    assert counted / plain == pytest.approx(whole.bookkeeping / whole.ordinary, rel=0.01)


def test_sums_are_made_in_single_precision_under_autocast() -> None:
    """What the page says about bfloat16: forward and the gradients of inputs alone are products in it."""
    positions, wide, high = 96, 128, 256

    class Half(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    training, inputs = trained(
        Half(nn.Linear(8, wide, bias=False), nn.Linear(wide, high, bias=False)), torch.randn(SAMPLES, positions, 8)
    )
    whole = (cost.product(positions, 8, wide, inputs=False) + cost.product(positions, wide, high)) * SAMPLES
    counted = products(lambda: one_step(training, inputs))
    assert counted[torch.bfloat16] == whole.forward + whole.inputs
    assert counted[torch.float32] == pytest.approx(whole.norms + whole.sums, rel=0.05)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("rank", [0, 4])
def test_the_models_of_the_page_are_those_of_transformers(rank: int) -> None:
    """Their parameters and messages, and the operations of a step of book-keeping, all trained and with adapters."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = cost.Llama("small", layers=3, width=64, hidden=176, keys=32, words=300, rank=rank)
    made: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.words, num_hidden_layers=model.layers, hidden_size=model.width, intermediate_size=model.hidden,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    assert sum(p.numel() for p in made.parameters()) == model.numbers
    if rank:
        made = peft.get_peft_model(made, peft.LoraConfig(r=rank, target_modules="all-linear"))
    own = [p for p in made.parameters() if p.requires_grad]
    assert (sum(p.numel() for p in own), len(own)) == (model.trained, model.tensors)
    positions, ids = 32, torch.randint(0, model.words, (SAMPLES, 32))
    training, ids = trained(Logits(made), ids)
    whole = model.cost(positions) + cost.attention(positions, model.width) * -model.layers  # not counted on the CPU
    ((_, counted),) = products(lambda: one_step(training, ids)).items()
    first = (
        3 * 2 * positions * model.width * model.width * SAMPLES if rank else 0
    )  # no gradient of the first block's input
    assert counted == pytest.approx(whole.bookkeeping * SAMPLES - first, rel=0.02)


class Logits(nn.Module):
    """What a model of transformers returns, as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


def test_what_the_page_says_of_layers_is_what_the_formulas_say() -> None:
    """``python -m benchmarks.scaling_model --write docs/scaling.md`` writes the tables anew."""
    written = tables.written(PAGE).splitlines()
    assert [line for line in (*scaling_model.kinds(), *scaling_model.ways()) if line not in written] == []
