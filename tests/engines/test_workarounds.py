"""Operations that ``vmap`` refuses or gets wrong: padding tokens, writes into new tensors, inputs without samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.engines.functional.workarounds import Workarounds
from tests.cases import Case, classify, labelled, words
from tests.helpers import private, released
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, relative_error

mapping_engines = pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])


class Model(nn.Module):
    """A parameter of its own, used in a way that book-keeping has no rule for, puts the whole model under ``vmap``."""

    def __init__(self, **inside: nn.Module) -> None:
        super().__init__()
        self.own = nn.Parameter(0.1 * torch.randn(4))
        self.head = nn.Linear(4, 3)
        for name, module in inside.items():
            self.add_module(name, module)

    def scaled(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,i->...i", x, self.own)


class Padded(Model):
    """A padding token that the samples hold."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.scaled(self.table(ids))).mean(1))


class PaddedTable(nn.Embedding):
    """A subclass whose calls only ``vmap`` can follow."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, padding_idx=-self.num_embeddings)  # the same row, from the end


class PaddedTorch(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return torch.embedding(self.weight, input, 0)


class Positions(Model):
    """Language models look up positions that are the same for all samples."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).unsqueeze(0)
        grid = self.norm(self.places(places) + self.line(torch.linspace(0, 1, 4).to(x)))
        return self.head((self.scaled(x) + grid).mean(1))


class Grid(Model):
    """A convolution and a normalisation of what is the same for all samples."""

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, 8).to(x).view(1, 2, 4)
        return self.head((self.scaled(x) + self.norm(self.conv(grid)).mT[:, :1]).mean(1))


class Along(Model):
    """A recurrent layer of what is the same for all samples."""

    def forward(self, x: Tensor) -> Tensor:
        along, _ = self.recurrent(torch.linspace(0, 1, 12).to(x).view(1, 3, 4))
        return self.head((self.scaled(x) + along[:, -1:]).mean(1))


class Written(Model):
    """Values of the samples go into tensors that were made for the whole batch; as masked autoencoders do."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x)).unsqueeze(1)
        order = x.sum(2).argsort(1)[:, :2]
        mask = torch.ones(x.shape[:2], dtype=torch.int32).to(x.device)
        mask[rows, order] = 0
        filled = torch.zeros(*x.shape[:2], 4).to(x)
        filled[rows, order] = self.scaled(x)[rows, order]
        total = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            total += filled[:, t] * (2 - mask[:, t : t + 1])
        scaled = torch.full_like(total.detach(), 2.0).clone()
        scaled.mul_(total)
        return self.head(scaled)


class WrittenThroughView(Model):
    """A view was taken before: its values would not follow."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), 4, dtype=x.dtype)
        first = total[:, :2]
        total[:, 1:] = self.scaled(x)[:, 0, 1:]
        return self.head(total + F.pad(first, (0, 2)))


class WrittenInAView(Model):
    """The value is written into a view, and read from the whole."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), 4, dtype=x.dtype)
        total[:, :2].add_(self.scaled(x[:, 0])[:, :2])
        return self.head(total + x[:, 1])


def case_of(model: type[Model], sample: Any, **inside: Any) -> Case:
    return Case(
        model.__name__, lambda: model(**{n: kind(*given) for n, (kind, *given) in inside.items()}), sample, classify
    )


RIGHT = (
    case_of(Padded, words(), table=(nn.Embedding, 11, 4, 0)),
    case_of(Padded, words(), table=(PaddedTable, 11, 4)),
    case_of(Padded, words(), table=(PaddedTorch, 11, 4)),
    case_of(
        Positions, labelled(5, 4), places=(nn.Embedding, 9, 4), line=(nn.Linear, 4, 4), norm=(nn.LayerNorm, 4)
    ),
    case_of(Grid, labelled(5, 4), conv=(nn.Conv1d, 2, 4, 2), norm=(nn.GroupNorm, 2, 4)),
    case_of(Written, labelled(5, 4)),
)  # fmt: skip


def assert_released(case: Case, **arguments: Any) -> dpfix.PrivateTraining:
    model, training = private(case, **arguments)
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    for clip_norm in clip_norms(samples).values():
        found = released(case, model, training, clip_norm)
        assert relative_error(found, clipped_sum(samples, clip_norm)) <= 1e-9
    return training


@mapping_engines
@pytest.mark.parametrize("case", RIGHT, ids=lambda c: c.name)
def test_released_sum_is_that_of_batches_of_one(case: Case, engine: str) -> None:
    assert_released(case, grad_sample_mode=engine)


@pytest.mark.parametrize("case", RIGHT, ids=lambda c: c.name)
def test_no_batches_of_one_are_needed(case: Case) -> None:
    assert assert_released(case).plan.engine != "microbatch"


def test_recurrent_layer_of_what_is_the_same_for_all_samples() -> None:
    """With ``vmap`` alone torch has no recurrent layers."""
    case = case_of(Along, labelled(5, 4), recurrent=(nn.GRU, 4, 4, 1, True, True))
    assert assert_released(case).plan.engine == "bookkeeping"


@pytest.mark.parametrize("model", [WrittenThroughView, WrittenInAView])
def test_writes_that_views_share_are_left_to_batches_of_one(model: type[Model]) -> None:
    assert assert_released(case_of(model, labelled(5, 4))).plan.engine == "microbatch"


def test_padding_token_keeps_its_row() -> None:
    """Padding tokens are in the samples, so that a gradient of their row would be seen."""
    case = RIGHT[0]
    assert any(bool((ids == 0).any()) for ids, _ in case.samples())
    model, training = private(case, grad_sample_mode="vmap")
    assert not released(case, model, training, 1e9)["table.weight"][0].any()


def test_tensors_of_the_model_are_never_widened() -> None:
    """Only what was made in this forward is: a buffer that takes values of samples stays refused."""
    buffer = torch.zeros(3)

    def one(x: Tensor) -> Tensor:
        with Workarounds():
            same = buffer.to(buffer.dtype)
            with pytest.raises(RuntimeError, match="broadcast shape"):
                same.add_(x)
            new = torch.zeros(3)
            new += x
            return new * 1

    assert torch.equal(torch.vmap(one)(torch.ones(2, 3)), torch.ones(2, 3))
    assert torch.equal(buffer, torch.zeros(3)) and not torch._C._functorch.is_batchedtensor(buffer)
