"""The promise: what a step releases is the sum of clipped per-sample gradients, for every model and engine."""

from __future__ import annotations

import pytest
import torch

import dpfix
from dpfix.engines import ENGINES
from tests.cases import BY_NAME, CASES, Case
from tests.helpers import private, released
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, relative_error

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}

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


@every_case
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_by_name_is_right_or_refused(case: Case, engine: str) -> None:
    try:
        assert_releases_clipped_sums(case, torch.float64, grad_sample_mode=engine)
    except dpfix.ModelError as refusal:
        assert engine != "microbatch", "microbatch is always right"
        assert engine in str(refusal)


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
        RecordedDropout.drawn.append(mask.detach())
        return x * mask


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
