"""What the call sees although the samples of the probe do not show it: rare labels, missing values, rare branches."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import dpfix
from dpfix.instrument.fixed_outside import FixedOutside
from tests.audit.test_isolation import make, refusal, vectors
from tests.reference import Step

COUNT = 120


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def mlp(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes))


# ------------------------------------------------------------------ losses that couple on a few samples only


def labelled(classes: int, rare: int | None = None) -> list[tuple[Tensor, int]]:
    """Samples of some classes; one more class in a single sample."""
    items = [(torch.randn(6, generator=draw(i)), i % classes) for i in range(COUNT)]
    return items if rare is None else [*items[:-1], (items[-1][0], rare)]


def sequences(filler: int, *, rare: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets; every few samples, the targets end in a filler."""
    items = []
    for i in range(COUNT):
        x = torch.randn(5, 6, generator=draw(i))
        y = torch.randint(1, 3, (5,), generator=draw(i))
        if i % rare == rare - 1:
            y[1:] = filler
        items.append((x, y))
    return items


def with_missing(missing: float, *, rare: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Regression targets, some of them missing."""
    items = []
    for i in range(COUNT):
        y = torch.randn(4, generator=draw(i))
        if i % rare == rare - 1:
            y[1:] = missing
        items.append((torch.randn(6, generator=draw(i)), y))
    return items


def over_tokens(loss: Callable[..., Tensor]) -> Step:
    return lambda model, batch: loss(model(batch[0]).transpose(1, 2), batch[1])


def masked_mean(there: Callable[[Tensor], Tensor]) -> Step:
    def step(model: nn.Module, batch: Any) -> Tensor:
        known = there(batch[1])
        return (model(batch[0]) - batch[1])[known].square().mean()

    return step


def imputed(model: nn.Module, batch: Any) -> Tensor:
    y = torch.where(torch.isnan(batch[1]), torch.nanmean(batch[1]), batch[1])
    return F.mse_loss(model(batch[0]), y)


def balanced(model: nn.Module, batch: Any) -> Tensor:
    counts = torch.bincount(batch[1], minlength=3).clamp(min=1)
    return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") / counts[batch[1]]).mean()


RARE_WEIGHT = torch.tensor([1.0, 1.0, 1.0, 20.0])


def weighted(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], weight=RARE_WEIGHT)


def ignoring(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=3)


def same_label_pairs(model: nn.Module, batch: Any) -> Tensor:
    """A pull between samples of one label."""
    out, y = model(batch[0]), batch[1]
    same = (y[:, None] == y[None]) & ~torch.eye(len(y), dtype=torch.bool)
    distance = (out[:, None] - out[None]).square().sum(2)
    return F.cross_entropy(out, y) + (distance * same).sum() / len(y)


def by_lengths(model: nn.Module, batch: Any) -> Tensor:
    """A sum over the valid tokens, over a Python sum of lengths."""
    x, y, lengths = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    there = torch.arange(y.shape[1])[None] < torch.tensor(lengths)[:, None]
    return (losses * there).sum() / sum(lengths)


def by_listed_targets(model: nn.Module, batch: Any) -> Tensor:
    """Targets in a Python list; the mean is taken over those that are there."""
    out = model(batch[0])
    known = [i for i, y in enumerate(batch[1]) if y >= 0]
    losses = [F.cross_entropy(out[i : i + 1], torch.tensor(batch[1][i : i + 1])) for i in known]
    return torch.stack(losses).sum() / len(known) if known else out.sum() * 0


def listed(items: list[Any]) -> tuple[Any, ...]:
    x, *others = zip(*items, strict=True)
    return (torch.stack(x), *map(list, others))


def long_and_short() -> list[tuple[Tensor, Tensor, int]]:
    return [(x, y, 5 if i % 30 else 1) for i, (x, y) in enumerate(sequences(1))]


def with_lengths(items: list[Any]) -> tuple[Tensor, Tensor, list[int]]:
    x, y, lengths = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y), list(lengths)


COUPLED: dict[str, tuple[nn.Module, Step, list[Any], dict[str, Any]]] = {
    "tokens of -100, rarely": (nn.Linear(6, 3), over_tokens(F.cross_entropy), sequences(-100, rare=12), {}),
    "tokens of 0 that are masked": (
        nn.Linear(6, 3),
        lambda m, b: (F.cross_entropy(m(b[0]).transpose(1, 2), b[1], reduction="none") * (b[1] != 0)).sum()
        / (b[1] != 0).sum(),
        sequences(0, rare=12),
        {},
    ),
    "missing targets of NaN": (mlp(4), masked_mean(lambda y: ~torch.isnan(y)), with_missing(float("nan"), rare=12), {}),
    "missing targets of -999": (mlp(4), masked_mean(lambda y: y != -999), with_missing(-999.0, rare=12), {}),
    "missing targets imputed": (mlp(4), imputed, with_missing(float("nan"), rare=12), {}),
    "a rare heavy class": (mlp(4), weighted, labelled(3, rare=3), {}),
    "a rare class that is ignored": (mlp(4), ignoring, labelled(3, rare=3), {}),
    "balanced over the batch": (mlp(), balanced, labelled(3), {}),
    "pairs of one label among many": (mlp(60), same_label_pairs, labelled(60), {}),
    "sum of lengths": (nn.Linear(6, 3), by_lengths, long_and_short(), {"collate": with_lengths}),
    "listed targets": (
        mlp(),
        by_listed_targets,
        [(x, y if i % 12 else -1) for i, (x, y) in enumerate(labelled(3))],
        {"collate": listed},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_loss_that_couples_on_a_few_samples_is_refused_at_the_call(name: str) -> None:
    model, step, items, options = COUPLED[name]
    message = refusal(dpfix.CoupledLossError, model, step, items=items, **options)
    assert "not the mean of the losses of its samples" in message


def test_criterion_with_a_rare_heavy_class_is_refused_at_the_call() -> None:
    message = refusal(
        dpfix.CoupledLossError, mlp(4), criterion=nn.CrossEntropyLoss(weight=RARE_WEIGHT), items=labelled(3, rare=3)
    )
    assert "CrossEntropyLoss(weight=..., reduction='mean')" in message and "dpfix.PerSampleLoss(criterion)" in message


def test_criterion_with_an_ignored_class_is_refused_at_the_call() -> None:
    criterion = nn.CrossEntropyLoss(ignore_index=3)
    assert "ignore_index=3" in refusal(dpfix.CoupledLossError, mlp(4), criterion=criterion, items=labelled(3, rare=3))


def test_small_penalty_on_a_solved_task_is_refused() -> None:
    """The probe's values are redrawn, so that the task is solved whatever they are: the loss is flat there."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        z = out - out.mean(0)
        return F.cross_entropy(out, batch[1]) + 1e-5 * (z.t() @ z / len(z)).square().mean()

    assert "not the mean" in refusal(dpfix.CoupledLossError, mlp(), step)


def test_weak_mixing_in_the_model_is_refused() -> None:
    class Weak(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-3 * (x - x.mean(0))

    model = nn.Sequential(nn.Linear(6, 8), Weak(), nn.Linear(8, 3))
    assert "Weak at `1`" in refusal(dpfix.CoupledModelError, model)


def test_mask_of_booleans_that_is_complete_in_all_samples() -> None:
    """Every mask that is seen is full; the mean over what is masked couples once one is not."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, mask, y = batch
        losses = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
        return losses[mask].mean()

    items = [(x, torch.ones(5, dtype=torch.bool), y) for x, y in sequences(1)]
    assert "not the mean" in refusal(dpfix.CoupledLossError, nn.Linear(6, 3), step, items=items)


def test_shorter_samples_show_a_mask_that_couples() -> None:
    class Mean(nn.Module):
        """Divides by the number of words of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            there = mask[..., None].float()
            return self.head((self.words(ids) * there).sum(1) / there.sum(1).mean())

    items = [
        (torch.randint(0, 9, (5,), generator=draw(i)), torch.ones(5, dtype=torch.bool), i % 3) for i in range(COUNT)
    ]
    message = refusal(dpfix.CoupledModelError, Mean(), criterion=nn.CrossEntropyLoss(), items=items)
    assert "mixes the samples" in message


# ------------------------------------------------------------------ rare branches


class Mixing(nn.Module):
    """Mixes the samples with some probability."""

    def __init__(self, chance: Callable[[], bool]) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x.flip(0) if self.chance() else x


OWN, OWN_PYTHON = np.random.default_rng(0), random.Random(0)
CHANCES: dict[str, Callable[[], bool]] = {
    "torch, half": lambda: torch.rand(1).item() < 0.5,
    "torch, the other half": lambda: torch.rand(1).item() > 0.6,
    "torch, a tenth": lambda: bool(torch.rand(()) < 0.1),
    "Python": lambda: random.random() < 0.1,
    "Python, the other end": lambda: random.random() > 0.9,
    "NumPy": lambda: bool(np.random.rand() < 0.1),
    "a generator of NumPy": lambda: OWN.random() < 0.5,
    "a generator of Python": lambda: OWN_PYTHON.random() < 0.5,
}


@pytest.mark.parametrize("name", CHANCES)
def test_branch_that_mixes_by_chance_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Mixing(CHANCES[name]), nn.Linear(8, 3))
    assert "Mixing at `1`" in refusal(dpfix.CoupledModelError, model)


class Dropped(nn.Module):
    """A layer that is left out at random, for the whole batch."""

    def __init__(self, chance: Callable[[], bool]) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x if self.chance() else x + torch.tanh(self.layer(x)))


@pytest.mark.parametrize("name", CHANCES)
def test_layer_that_is_dropped_for_the_whole_batch_is_accepted_and_trained(name: str) -> None:
    model = Dropped(CHANCES[name])
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    own = OWN.bit_generator.state, OWN_PYTHON.getstate()
    training = make(model)
    assert training.plan.frozen_parameters == ()
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert OWN.bit_generator.state == own[0] and OWN_PYTHON.getstate() == own[1]


def test_draws_of_python_and_numpy_for_one_sample_after_the_other_are_accepted() -> None:
    def flipped(model: nn.Module, batch: Any) -> Tensor:
        signs = torch.tensor([[1.0 if random.random() < 0.5 else -1.0] for _ in batch[0]])
        noise = torch.from_numpy(np.random.normal(0, 0.1, batch[0].shape)).float()
        return F.cross_entropy(model(batch[0] * signs + noise), batch[1])

    make(mlp(), flipped)


class SpansLeftOut(nn.Module):
    """Leaves spans of each sample out: how many is drawn once for all, where for one sample after the other."""

    def __init__(self, chosen: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.chosen, self.instead = chosen, nn.Parameter(0.1 * torch.ones(6))
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, spans = torch.tanh(self.first(x)), 2 + int(np.random.rand(1).item() + random.random())
        left_out = np.zeros(h.shape, dtype=bool)
        for row in left_out:
            row[self.chosen(row.size, spans)] = True
        return self.head(torch.where(torch.from_numpy(left_out), self.instead, h))


PLACES: dict[str, Callable[[int, int], Any]] = {
    "NumPy": lambda size, count: np.random.choice(np.arange(size), count, replace=False),
    "NumPy, in order": lambda size, count: np.random.permutation(size)[:count],
    "Python": lambda size, count: random.sample(range(size), count),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_each_sample_draws_after_a_draw_for_all_is_accepted(name: str) -> None:
    model, optimizer, loader = make(SpansLeftOut(PLACES[name]))
    for x, y in loader:  # real steps are proven too
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("order", [np.random.permutation, lambda n: random.sample(range(n), n)])
def test_samples_mixed_in_an_order_that_is_drawn_are_refused(order: Callable[[int], Any]) -> None:
    def mixup(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        share, other = float(np.random.beta(2, 2)), torch.as_tensor(order(len(x)))
        return F.cross_entropy(model(share * x + (1 - share) * x[other]), y)

    with pytest.raises(dpfix.CoupledModelError):
        make(mlp(), mixup)


def test_draws_of_another_thread_go_on() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    with FixedOutside(python=1, numpy=1) as fixed, ThreadPoolExecutor(1) as pool:
        assert random.random() == random.random() and np.random.rand() == np.random.rand()
        assert pool.submit(random.random).result() != pool.submit(random.random).result()
        rows = np.random.normal(size=(3, 4))
        assert (rows == rows[0]).all() and len(set(rows[0])) == 4
        assert len({*np.random.choice(9, 5, replace=False)}) == 5
        assert fixed.drawn == 6
        waited_for: set[int] = set()
        while len(waited_for) < 2:  # for another number
            waited_for.add(np.random.randint(9))
    random.setstate(before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]


# ------------------------------------------------------------------ right scripts that such labels must not stop


def per_sample_valid(model: nn.Module, batch: Any) -> Tensor:
    """The mean over the valid tokens of each sample, then over the samples."""
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
    there = batch[1] != -100
    return ((losses * there).sum(1) / there.sum(1).clamp(min=1)).mean()


def one_after_the_other(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return torch.stack([F.cross_entropy(o[None], y[None]) for o, y in zip(out, batch[1], strict=True)]).mean()


TEACHER = nn.Linear(6, 4).requires_grad_(False)
PROTOTYPES = torch.randn(4, 4, generator=draw())
COSTS = torch.rand(4, 4, generator=draw(1))


def distilled(model: nn.Module, batch: Any) -> Tensor:
    return F.kl_div(model(batch[0]).log_softmax(1), TEACHER(batch[0]).softmax(1), reduction="batchmean")


def nearest_prototype(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(-torch.cdist(model(batch[0]), PROTOTYPES), batch[1])


def expected_cost(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).softmax(1) * COSTS[batch[1]]).sum(1).mean()


def missing_left_out(model: nn.Module, batch: Any) -> Tensor:
    there = ~torch.isnan(batch[1])
    losses = (model(batch[0]) - torch.nan_to_num(batch[1])).square() * there
    return (losses.sum(1) / there.sum(1).clamp(min=1)).mean()


def squeezed(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), (batch[1] > 0).float())


class Annealed:
    """A term whose weight grows with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]) + self.calls / 1e5 * out.square().sum(1).mean()


def fixed_count(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") / len(batch[1])


RIGHT: dict[str, tuple[nn.Module, Step, list[Any]]] = {
    "valid tokens of each sample": (nn.Linear(6, 3), per_sample_valid, sequences(-100)),
    "labels that are never ignored": (nn.Linear(6, 3), over_tokens(F.cross_entropy), sequences(1)),
    "one loss after the other": (mlp(), one_after_the_other, labelled(3)),
    "a teacher as wide as the probe": (mlp(4), distilled, labelled(4)),
    "as many prototypes as samples": (mlp(4), nearest_prototype, labelled(4)),
    "a matrix of costs": (mlp(4), expected_cost, labelled(4)),
    "missing targets left out of each sample": (mlp(4), missing_left_out, with_missing(float("nan"))),
    "outputs of shape (B,)": (mlp(1), squeezed, labelled(3)),
    "a sum over a fixed count": (mlp(), fixed_count, labelled(3)),
    "a term that every call weighs more": (mlp(), Annealed(), labelled(3)),
    "PerSampleLoss with weights": (
        mlp(4),
        (lambda loss: lambda m, b: loss(m(b[0]), b[1]))(dpfix.PerSampleLoss(nn.CrossEntropyLoss(weight=RARE_WEIGHT))),
        labelled(3, rare=3),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_are_accepted(name: str) -> None:
    model, step, items = RIGHT[name]
    lines = make(model, step, items=items).report.audit
    assert any("other set(s) of labels" in line for line in lines)
    assert any("equal those of single samples (double precision)" in line for line in lines)


@pytest.mark.parametrize("seed", [14, 15, 16])
def test_what_every_call_weighs_more_is_no_fault_of_an_engine(seed: int) -> None:
    """The engines run some fifty calls after the reference, and the gradient of a bias may be small by then."""
    torch.manual_seed(seed)
    report = make(mlp(), Annealed(), items=labelled(3)).report
    assert report.engine not in {"", "microbatch"}


# ------------------------------------------------------------------ who is to blame


def mixed_up(model: nn.Module, batch: Any) -> Tensor:
    x = 0.65 * batch[0] + 0.35 * batch[0].roll(1, 0)
    return F.cross_entropy(model(x), batch[1])


def scaled_by_the_largest(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0] / batch[0].abs().max()), batch[1])


def with_neighbours(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    nearest = torch.cdist(x, x).argsort(1)[:, min(1, len(x) - 1)]
    return F.cross_entropy(model(x + 0.5 * x[nearest]), batch[1])


@pytest.mark.parametrize("step", [mixed_up, scaled_by_the_largest, with_neighbours])
def test_step_that_mixes_before_the_model_is_named(step: Step) -> None:
    message = refusal(dpfix.CoupledModelError, mlp(), step)
    assert message.startswith("DPF041") and "training_step mixes the samples of a batch before the model" in message
    assert "Linear" not in message


def test_collate_fn_that_mixes_is_named() -> None:
    def standardised(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([x for x, _ in items])
        return x - x.mean(), torch.tensor([y for _, y in items])

    message = refusal(dpfix.CoupledModelError, mlp(), collate=standardised)
    assert message.startswith("DPF046") and "collate_fn (standardised" in message and "mixes the samples" in message


def test_padding_in_collate_fn_is_named() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    def pad(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])

    items = [(torch.randn(2 + i % 3, 6, generator=draw(i)), i % 3) for i in range(12)]
    message = refusal(
        dpfix.CoupledModelError, nn.Sequential(Mean(6, 8), nn.Tanh(), nn.Linear(8, 3)), items=items, collate=pad
    )
    assert "Mean at `0`" in message and "collate_fn pads every sample to the longest one of its batch" in message


def test_hook_of_the_user_is_named() -> None:
    model = mlp()
    model[1].register_forward_hook(lambda m, args, out: out - out.mean(0))
    message = refusal(dpfix.CoupledModelError, model)
    assert message.startswith("DPF042") and "a hook on Tanh at `1`" in message and "test_look_harder.py" in message


def test_hook_before_forward_is_named() -> None:
    model = mlp()
    model[2].register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(0),))
    assert "a hook on Linear at `2`" in refusal(dpfix.CoupledModelError, model)


# ------------------------------------------------------------------ the way out leads out


def test_per_sample_loss_is_advised_where_it_cures() -> None:
    criterion = nn.CrossEntropyLoss(weight=RARE_WEIGHT)
    items = labelled(3, rare=3)
    message = refusal(dpfix.CoupledLossError, mlp(4), criterion=criterion, items=items)
    assert "criterion = dpfix.PerSampleLoss(criterion)" in message
    make(mlp(4), criterion=dpfix.PerSampleLoss(criterion), items=items)


def test_per_sample_loss_is_not_advised_a_second_time() -> None:
    loss = dpfix.PerSampleLoss(nn.CrossEntropyLoss())

    def step(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return loss(out - out.mean(0), batch[1])

    message = refusal(dpfix.CoupledLossError, mlp(), step)
    assert "criterion = dpfix.PerSampleLoss(criterion)" not in message and "in two steps" in message


def per_token(model: nn.Module, batch: Any) -> Tensor:
    y = batch[1]
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), y, reduction="none", ignore_index=-100)
    return losses.sum() / int((y[0] != -100).sum())  # the tokens of one sample only: a sum, as long as all are full


def test_sum_is_not_advised_where_it_leads_into_a_coupling() -> None:
    message = refusal(dpfix.CoupledLossError, nn.Linear(6, 3), per_token, items=sequences(-100, rare=60))
    assert "pass loss_reduction" not in message


def test_sum_is_advised_where_it_helps() -> None:
    criterion = nn.CrossEntropyLoss(reduction="sum")
    message = refusal(dpfix.LossError, mlp(), criterion=criterion)
    assert "pass loss_reduction='sum'" in message
    make(mlp(), criterion=criterion, loss_reduction="sum")


def test_no_value_of_the_data_is_told() -> None:
    items = [(x, torch.where(y == -999, torch.tensor(-31.0), y)) for x, y in with_missing(-999.0)]
    message = refusal(dpfix.CoupledLossError, mlp(4), masked_mean(lambda y: y != -31), items=items)
    assert "31" not in message.replace("3.1", "")


def test_vectors_are_still_accepted() -> None:
    make(mlp(), items=vectors())
