"""Automatic clipping, clip norms of named groups and of layers: the same sums from every engine, proven in the same way."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPPerLayerOptimizer
from opacus.schedulers import ExponentialGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.audit.clipped_sum import check_engine, movement
from dpfix.audit.released import released_sums
from dpfix.engines import ENGINES
from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.instrument.clipping import Scheme, grouped
from tests.audit.setups import Looked, labelled, look
from tests.cases import CASES, Case
from tests.helpers import points, private, released, setting, sgd
from tests.reference import Gradients, gradients_one_by_one, norm, relative_error

Factor = Callable[[float, float], float]
MODELS = (
    "linear", "conv2d-uneven", "group-norm", "embedding-tied", "attention", "lstm", "class-token", "functional-weight",
    "linear-sum",
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def usual(clip: float, size: float) -> float:
    return min(1.0, clip / (size + 1e-6))


def auto_s(clip: float, size: float) -> float:
    return clip / (size + 0.01)


def by_hand(samples: Sequence[Gradients], groups: dict[tuple[str, ...], float], factor: Factor) -> Gradients:
    """Every sample's gradient clipped group by group, and their sum."""
    total = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in samples[0].items()}
    for gradients in samples:
        for names, clip in groups.items():
            times = factor(clip, norm({n: gradients[n] for n in names}))
            for n in names:
                total[n] += times * gradients[n].double()
    return total


def ways(names: Sequence[str]) -> dict[str, tuple[dict[str, Any], dict[tuple[str, ...], float], Factor]]:
    """Arguments of the call, groups of parameters with their clip norms, and the factor."""
    first, others = names[0], tuple(names[1:])
    layers = {n: 0.1 + 0.05 * i for i, n in enumerate(names)}
    return {
        "automatic": ({"clipping": "automatic", "max_grad_norm": 0.7}, {tuple(names): 0.7}, auto_s),
        "per_group": (
            {"clipping": "per_group", "max_grad_norm": {first: 0.2, "*": 0.6}},
            {(first,): 0.2, others: 0.6},
            usual,
        ),
        "per_layer": (
            {"clipping": "per_layer", "max_grad_norm": list(layers.values())},
            {(n,): c for n, c in layers.items()},
            usual,
        ),
    }


# ------------------------------------------------------------------ the sum


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "hooks", "functorch", "microbatch"])
@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_batches_of_one(name: str, way: str, engine: str) -> None:
    case = BY_NAME[name]
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    options, groups, factor = ways(list(samples[0]))[way]
    try:
        model, training = private(case, grad_sample_mode=engine, **options)
    except dpfix.ModelError:
        assert engine not in {"bookkeeping", "microbatch"}
        return
    together = math.hypot(*groups.values())
    assert training[1].max_grad_norm == pytest.approx(together, rel=1e-12)
    for level in (0.1, 1.0, 50.0):
        wanted = by_hand(samples, {names: level * clip for names, clip in groups.items()}, factor)
        assert relative_error(released(case, model, training, level * together), wanted) <= 1e-9


@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
def test_nothing_is_made_for_every_sample(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Book-keeping clips from norms."""
    case = BY_NAME["transformer"]
    options, *_ = ways([n for n, _ in case.build().named_parameters()])[way]
    model, training = private(case, grad_sample_mode="bookkeeping", **options)
    monkeypatch.delattr(BookkeepingHandle, "collect")
    released(case, model, training, 1.0)


def test_adaptive_clipping_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["transformer"]
    options = {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 1e9,
        "min_clipbound": 1e-9, "unclipped_num_std": 1e-9,
    }  # fmt: skip
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    clip = sorted(map(norm, samples))[2] + 1e-4  # three of six stay as they are
    model, training = private(case, grad_sample_mode="bookkeeping", max_grad_norm=clip, **options)
    monkeypatch.delattr(BookkeepingHandle, "collect")
    found = released(case, model, training, clip)
    assert relative_error(found, by_hand(samples, {tuple(samples[0]): clip}, usual)) <= 1e-9
    assert training[1].sample_size == 6 and float(training[1].unclipped_num) == pytest.approx(3, abs=1e-6)
    assert training[1].max_grad_norm == pytest.approx(clip, rel=1e-6)


@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
@pytest.mark.parametrize("how", ["without a wrapper", "autocast", "split", "views"])
def test_in_other_loops(how: str, way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = points(8).tensors
    names = [n for n, _ in model.named_parameters()]
    options, groups, factor = ways(names)[way]
    views = how == "views"
    rows = [torch.stack([row, -row] if views else [row]) for row in x]
    singles = [(row, label.repeat(len(row))) for row, label in zip(rows, y, strict=True)]
    samples = gradients_one_by_one(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), singles)

    signs = itertools.cycle((1.0, -1.0))

    def other_view(x: Tensor) -> Tensor:
        return next(signs) * x

    if views:
        options |= {"augmentation": dpfix.AugmentationMultiplicity(other_view, k=2)}
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=DataLoader(TensorDataset(x, y), batch_size=8), noise_multiplier=0.0,
        criterion=nn.CrossEntropyLoss(), wrap_model=how != "without a wrapper", grad_sample_mode="bookkeeping", **options,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    vars(training[2])["batch_sampler"] = [list(range(8))]

    def loop(batches: Any) -> None:
        for inputs, labels in batches:
            training[1].zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            training[1].step()

    if how == "split":
        with BatchMemoryManager(data_loader=training[2], max_physical_batch_size=3, optimizer=training[1]) as split:
            loop(split)
    else:
        loop(training[2])
    moved = {n: (before[n] - p.detach()) * 8 for n, p in model.named_parameters()}
    assert relative_error(moved, by_hand(samples, groups, factor)) <= (5e-2 if how == "autocast" else 1e-5)


# ------------------------------------------------------------------ the proof


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.shift))


PARAMETERS = ("shift", "first.weight", "first.bias", "head.weight", "head.bias")
SCHEMES = {
    "automatic": Scheme("automatic", stability=0.01),
    "groups": grouped("per_group", [("first", PARAMETERS[1:3], 0.3), ("others", [*PARAMETERS[3:], "shift"], 1.0)]),
    "layers": grouped("per_layer", [(name, [name], 1.0 + i) for i, name in enumerate(PARAMETERS)]),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def looked(scheme: str) -> Looked:
    torch.manual_seed(1)
    found = look(Three().double(), labelled(5))
    return replace(found, plan=replace(found.plan, clipping=SCHEMES[scheme]))


@every_scheme
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "microbatch"])
def test_a_sample_moves_the_sum_by_the_clip_norm_at_most(scheme: str, engine: str) -> None:
    found = looked(scheme)
    assert found.check_bounded(ENGINES[engine], 0).passed
    plan = found.plan.with_engine(ENGINES[engine])
    moved = []
    for clip in (1e-4, 0.1, 1.0):
        for i in range(4):
            sums = [
                released_sums(ENGINES[engine], found.subject, replace(found.trial, samples=samples), plan, (clip,))[0]
                for samples in (found.samples, found.samples.without(i))
            ]
            moved.append(movement(*sums, clip))
    assert max(moved) <= 1 + 1e-9
    assert max(moved) > 0.95, "the bound is reached, or the test would not see a larger one"


def wrong_clip_norm(scheme: Scheme, clip_norm: float) -> list[float]:
    right = [share * clip_norm for share in scheme.shares] if scheme.groups else [clip_norm]
    return [*right[:-1], 1.05 * right[-1]]


def wrong_factors(scheme: Scheme, norms: Tensor, clip_norm: float) -> Tensor:
    if scheme.stability:
        return 0.95 * clip_norm / (norms + scheme.stability)
    return (clip_norm / (norms + 1e-6)).clamp(max=1.0).square()


MUTATIONS = {"clip_norms": wrong_clip_norm, "factors": wrong_factors}


@every_scheme
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_a_wrong_factor_is_caught_by_the_audit(
    scheme: str, mutation: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looked(scheme)
    assert found.check(ENGINES[engine]).passed
    monkeypatch.setattr(Scheme, mutation, MUTATIONS[mutation])
    assert not found.check(ENGINES[engine]).passed


@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_a_wrong_factor_is_caught_on_a_real_step(
    way: str, mutation: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    options, *_ = ways([n for n, _ in model.named_parameters()])[way]
    data = TensorDataset(points().tensors[0].double(), points().tensors[1])
    training = dpfix.make_private_safe(
        **setting(model, data_loader=DataLoader(data, batch_size=8), grad_sample_mode=engine) | options
    )
    monkeypatch.setattr(Scheme, mutation, MUTATIONS[mutation])
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with pytest.raises(dpfix.PlanBrokenError, match="than is due"):
        for x, y in training[2]:
            training[1].zero_grad()
            F.cross_entropy(training[0](x), y).backward()
            training[1].step()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


def test_a_member_of_another_group_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    found = looked("groups")
    monkeypatch.setattr(Scheme, "members", lambda scheme, names: [[0], [*range(1, len(names))]])
    assert not check_engine(ENGINES["bookkeeping"], found.subject, found.trial, found.plan).passed


# ------------------------------------------------------------------ the clip norm while training


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
def test_a_scheduler_changes_noise_and_clip_norms_together(way: str, engine: str) -> None:
    """In Opacus it lowers the noise of clipping per layer, and leaves the clip norms as they are."""
    case = BY_NAME["linear"]
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    options, groups, factor = ways(list(samples[0]))[way]
    model, training = private(case, grad_sample_mode=engine, **options)
    scheduler = ExponentialGradClip(training[1], gamma=0.5)
    scheduler.step()
    assert training[1].max_grad_norm == pytest.approx(0.5 * math.hypot(*groups.values()))
    assert training[1].max_grad_norms == pytest.approx([0.5 * clip for clip in groups.values()])
    wanted = by_hand(samples, {names: 0.5 * clip for names, clip in groups.items()}, factor)
    assert relative_error(released(case, model, training, training[1].max_grad_norm), wanted) <= 1e-9


def test_one_of_several_clip_norms_is_not_changed_alone() -> None:
    _, optimizer, _ = dpfix.make_private_safe(**setting(clipping="per_layer", max_grad_norm=[1.0] * 4))
    assert isinstance(optimizer, DPPerLayerOptimizer)
    with pytest.raises(dpfix.ArgumentError, match="max_grad_norm, which scales them all"):
        optimizer.max_grad_norms = [2.0] * 4
    assert optimizer.max_grad_norms == [1.0] * 4


def test_per_layer_norms_are_those_of_the_module_whatever_the_optimizer_has_first() -> None:
    case = BY_NAME["linear"]
    samples = gradients_one_by_one(case.plain(), case.step, case.singles())
    options, groups, factor = ways(list(samples[0]))["per_layer"]
    for engine in ("bookkeeping", "hooks"):
        model = case.build()
        training = dpfix.make_private_safe(
            module=model, optimizer=torch.optim.SGD([*model.parameters()][::-1], lr=1.0), data_loader=case.loader(),
            noise_multiplier=0.0, poisson_sampling=False, training_step=case.step, grad_sample_mode=engine, **options,
        )  # fmt: skip
        together = math.hypot(*groups.values())
        assert relative_error(released(case, model, training, together), by_hand(samples, groups, factor)) <= 1e-9


# ------------------------------------------------------------------ what is not finite, and what is zero


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "hooks"])
@pytest.mark.parametrize("way", ["automatic", "per_group", "per_layer"])
def test_gradients_of_zero_and_of_infinite_norm_add_nothing(way: str, engine: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)) * x[:, :1]

    moved = []
    for draw in ([0, 1, 2, 3], [2, 3]):
        torch.manual_seed(0)
        model, (x, y) = Scaled(), points(8).tensors
        options, *_ = ways([n for n, _ in model.named_parameters()])[way]
        training = dpfix.make_private_safe(
            module=model, optimizer=sgd(model), data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
            noise_multiplier=0.0, training_step=lambda m, b: (m(b[0])[:, 0]).mean(), grad_sample_mode=engine, **options,
        )  # fmt: skip
        held = training[2].dataset.tensors[0]
        held[0], held[1] = 0.0, 3e30  # no gradient, and one whose norm overflows
        vars(training[2])["batch_sampler"] = [draw]
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        with warnings.catch_warnings(action="ignore"):
            for rows, _ in training[2]:
                training[1].zero_grad()
                training[0](rows)[:, 0].mean().backward()
                training[1].step()
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    torch.testing.assert_close(*moved)
    assert float(moved[0].norm()) > 0.01


# ------------------------------------------------------------------ what is said, saved and refused


def test_the_statement_says_the_total() -> None:
    training = dpfix.make_private_safe(**setting(clipping="per_group", max_grad_norm={"0.*": 3.0, "*": 4.0}))
    statement = training.statement(1e-3)
    assert statement.max_grad_norm == 5.0
    assert "`0.*` 0.6 C" in statement.clipping and "`*` 0.8 C" in statement.clipping
    assert statement.clipping in str(statement) and "together 5" in training.report.details()
    training = dpfix.make_private_safe(**setting(clipping="automatic", stability_constant=0.5))
    assert "C g / (|g| + 0.5)" in training.statement(1e-3).clipping


GROUPS = {"0.*": 1.0, "*": 1.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_grad_norm": GROUPS}, "per_group"),
        ({"clipping": "per_group", "max_grad_norm": 1.0}, "needs them"),
        ({"clipping": "per_group", "max_grad_norm": [1.0] * 4}, "needs them"),
        ({"clipping": "per_group", "max_grad_norm": {}}, "positive finite number"),
        ({"clipping": "per_group", "max_grad_norm": {"*": 0.0}}, "positive finite number"),
        ({"clipping": "per_group", "max_grad_norm": {"*": math.inf}}, "positive finite number"),
        ({"clipping": "per_group", "max_grad_norm": {"0.*": 1.0}}, "belongs to no group"),
        ({"clipping": "per_group", "max_grad_norm": {"0.*": 1.0, "encoder.*": 2.0, "*": 1.0}}, "No name matches"),
        ({"clipping": "per_group", "max_grad_norm": {"*": 1.0, "0.*": 2.0}}, "earlier pattern"),
        ({"clipping": "per_group", "max_grad_norm": {0: 1.0, "*": 1.0}}, "No name matches"),
        ({"clipping": "automatic", "max_grad_norm": [1.0] * 4}, "max_grad_norm has 4"),
        ({"clipping": "automatic", "max_grad_norm": GROUPS}, "per_group"),
        ({"clipping": "automatic", "stability_constant": 0.0}, "stability_constant"),
        ({"clipping": "automatic", "stability_constant": 1e-30}, "stability_constant"),
        ({"clipping": "automatic", "stability_constant": math.nan}, "stability_constant"),
        ({"clipping": "automatic", "stability_constant": "0.1"}, "stability_constant"),
        ({"stability_constant": 0.01}, "clipping='automatic'"),
        ({"clipping": "auto"}, "is not one of"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict[str, Any], says: str) -> None:
    given = setting()
    before = nn.utils.parameters_to_vector(given["module"].parameters()).detach().clone()
    with pytest.raises(dpfix.ArgumentError, match=says) as caught:
        dpfix.make_private_safe(**given | options)
    assert caught.value.findings[0].path in {"max_grad_norm", "stability_constant", "clipping"}
    assert torch.equal(nn.utils.parameters_to_vector(given["module"].parameters()), before)


def test_parameters_that_are_frozen_after_all_take_no_part() -> None:
    case: Case = BY_NAME["unused-layer"]
    _, training = private(case, clipping="per_group", max_grad_norm={"spare.*": 30.0, "*": 1.0})
    assert training.plan.frozen_parameters and training[1].max_grad_norm == 1.0


def test_a_checkpoint_knows_the_way_to_clip(tmp_path: Path) -> None:
    def begin(**options: Any) -> Any:
        torch.manual_seed(0)
        return dpfix.make_private_safe(**setting(privacy_engine=dpfix.SafePrivacyEngine(), **options))

    groups = {"clipping": "per_group", "max_grad_norm": {"0.*": 3.0, "*": 4.0}, "grad_sample_mode": "bookkeeping"}
    file = tmp_path / "run.pt"

    def load(training: Any) -> Any:
        training.privacy_engine.load_checkpoint(path=file, module=training[0], optimizer=training[1])
        return training[1]

    def save(training: Any) -> None:
        training.privacy_engine.save_checkpoint(path=file, module=training[0], optimizer=training[1])

    save(begin(**groups))
    assert load(begin(**groups)).max_grad_norms == pytest.approx([3.0, 4.0])
    with pytest.warns(dpfix.DPFixWarning, match="clipping was per_group"):
        found = load(begin(**groups | {"max_grad_norm": {"0.*": 4.0, "*": 3.0}})).max_grad_norms
    assert found == pytest.approx([4.0, 3.0])
    with pytest.warns(dpfix.DPFixWarning, match="and is automatic"):
        load(begin(clipping="automatic", max_grad_norm=5.0, grad_sample_mode="bookkeeping"))
    halved = begin(**groups)
    ExponentialGradClip(halved[1], gamma=0.5).step()
    save(halved)
    with pytest.warns(dpfix.DPFixWarning, match="from the checkpoint"):
        assert load(begin(**groups)).max_grad_norms == pytest.approx([1.5, 2.0])
