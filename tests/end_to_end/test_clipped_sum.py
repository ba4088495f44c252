"""The promise: what a step releases is the sum of clipped per-sample gradients, for every model and engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.engines import ENGINES, Verdict
from tests.cases import BY_NAME, CASES, Case
from tests.helpers import private, released
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, relative_error

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}

_OPACUS = frozenset((
    "bilinear", "embedding-padding", "embedding-tied", "embedding-bag", "attention", "attention-time-major",
    "attention-bias-kv", "transformer", "transformer-norm-first", "lstm-projected", "rnn", "lstm-cell", "gru-cell",
    "residual-in-place", "shared-module", "functional-weight", "parameter-list", "time-major", "folded-batch", "checkpointed",
))  # fmt: skip
REFUSED: dict[str, frozenset[str]] = {
    "vmap": frozenset((
        "lstm", "lstm-two-layers-both-ways", "lstm-projected", "gru", "rnn", "lstm-cell", "time-major",  # fused kernels
        "checkpointed",
    )),
    "hooks": _OPACUS | {"conv2d-reflect", "channels-last"},
    "functorch": _OPACUS,
}  # fmt: skip
"""Names of the cases that an engine is refused for. It is right on all others; an engine that is not named, on all."""

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_releases_clipped_sums(case: Case, dtype: torch.dtype, **changes: object) -> None:
    model, training = private(case, dtype, **changes)
    assert training.plan.frozen_parameters == case.unused
    samples = gradients_one_by_one(case.plain(dtype), case.step, case.singles(dtype))
    for name, clip_norm in clip_norms(samples).items():
        wanted = clipped_sum(samples, clip_norm)
        error = relative_error(released(case, model, training, clip_norm), wanted)
        assert error <= TOLERANCE[dtype], f"{training.plan.engine}, {name} clip norm {clip_norm:.3g}"


@every_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))
def test_chosen_engine(case: Case, dtype: torch.dtype) -> None:
    assert_releases_clipped_sums(case, dtype)


def assert_right_or_refused(case: Case, engine: str) -> None:
    if case.name not in REFUSED.get(engine, ()):
        assert_releases_clipped_sums(case, torch.float64, grad_sample_mode=engine)
        return
    with pytest.raises(dpfix.ModelError, match=engine):
        assert_releases_clipped_sums(case, torch.float64, grad_sample_mode=engine)


@every_case
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_by_name_is_right_or_refused_as_stated(case: Case, engine: str) -> None:
    assert_right_or_refused(case, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_supports_nothing_is_not_as_stated(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINES[engine], "supports", lambda module, record: Verdict("it supports nothing"))
    with pytest.raises(dpfix.ModelError, match="it supports nothing"):
        assert_right_or_refused(BY_NAME["linear"], engine)


def test_what_is_stated_as_refused_exists() -> None:
    assert REFUSED.keys() <= ENGINES.keys()
    assert set().union(*REFUSED.values()) <= BY_NAME.keys()


@every_case
def test_without_a_wrapper(case: Case) -> None:
    assert_releases_clipped_sums(case, torch.float64, wrap_model=False)


class RecordedDropout(torch.nn.Dropout):
    """A dropout whose real masks are kept outside the model, or played back."""

    drawn: list[torch.Tensor] = []  # noqa: RUF012 - shared on purpose: state on the module would be refused
    played: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if RecordedDropout.played is not None:
            return x * RecordedDropout.played.pop(0)
        mask = super().forward(torch.ones_like(x))
        RecordedDropout.drawn.append(_whole(mask.detach()))
        return x * mask


def _whole(mask: torch.Tensor) -> torch.Tensor:
    """The masks of all samples; under ``vmap`` a tensor shows one sample only."""
    if not torch._C._functorch.is_batchedtensor(mask):
        return mask
    dim = torch._C._functorch.maybe_get_bdim(mask)
    return torch._C._functorch.get_unwrapped(mask).movedim(dim, 0).flatten(0, 1)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_dropout_masks_of_forward_and_gradient_are_the_same(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def factory() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 8), RecordedDropout(0.4), torch.nn.Linear(8, 3))

    plain = BY_NAME["linear"]
    case = Case("dropout", factory, plain.sample, plain.step)
    model, training = private(case, grad_sample_mode=engine)
    monkeypatch.setattr(RecordedDropout, "drawn", [])
    found = released(case, model, training, 0.5)
    rows = list(torch.cat(RecordedDropout.drawn).split(1))
    monkeypatch.setattr(RecordedDropout, "played", rows)
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    assert relative_error(found, clipped_sum(samples, 0.5)) <= 1e-6
    assert len({tuple(row.flatten().tolist()) for row in torch.cat(RecordedDropout.drawn)}) > 1


class Listed(nn.Module):
    """Takes a list with one entry per sample, of whatever size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, pieces: list[list[torch.Tensor]]) -> torch.Tensor:
        return self.head(torch.stack([torch.tanh(self.inner(p[0])).sum(0) for p in pieces]))


@pytest.mark.parametrize("sizes", [(2, 3, 4), (3, 4, 2), (4, 2, 3), (5, 1, 3, 2)])
def test_list_of_samples(sizes: tuple[int, ...]) -> None:
    def step(model: nn.Module, batch: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        return F.cross_entropy(model([[x] for x, _ in batch]), torch.tensor([y for _, y in batch]))

    draw = torch.Generator().manual_seed(1)
    items = [(torch.randn(sizes[i % len(sizes)], 3, generator=draw), i % 3) for i in range(12)]
    loader: DataLoader[object] = DataLoader(items, batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    model = Listed()
    given = {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0), "data_loader": loader}
    training = dpfix.make_private_safe(**given, noise_multiplier=0.0, max_grad_norm=0.1, training_step=step)
    for batch in training[2]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        wanted = clipped_sum(gradients_one_by_one(model.eval(), step, [[x] for x in batch]), 0.1)
        model.train()
        training[1].zero_grad()
        step(training[0], batch).backward()
        training[1].step()
        moved = {n: (before[n] - p.detach()) * training[1].expected_batch_size for n, p in model.named_parameters()}
        assert not batch or relative_error(moved, wanted) <= 1e-3


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_the_old_kind() -> None:
    """Its hook leaves the weight it has computed as an attribute, also from inside vmap."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 6, generator=draw), torch.randint(0, 3, (24,), generator=draw))
    given = {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0), "criterion": F.cross_entropy}
    training = dpfix.make_private_safe(
        **given, data_loader=DataLoader(data, batch_size=8), noise_multiplier=0.0, max_grad_norm=0.1
    )
    for x, y in training[2]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        wanted = clipped_sum(
            gradients_one_by_one(model.eval(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), singles), 0.1
        )
        model.train()
        training[1].zero_grad()
        F.cross_entropy(training[0](x), y).backward()
        assert model[0].weight.detach().clone().shape == (8, 6)  # what is left outside vmap can be read
        training[1].step()
        moved = {n: (before[n] - p.detach()) * training[1].expected_batch_size for n, p in model.named_parameters()}
        assert relative_error(moved, wanted) <= 1e-3
