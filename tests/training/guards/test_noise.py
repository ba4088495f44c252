"""Every release holds fresh noise of the standard deviation that is accounted, on every parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.training.guards.noise import Numbers, ProvenNoise
from tests.helpers import points
from tests.training.steps import loss_of, start, values

WAYS: dict[str, dict[str, Any]] = {
    "in place": {"grad_sample_mode": "bookkeeping"},
    "per-sample gradients": {"grad_sample_mode": "vmap"},
    "Opacus's hooks": {"grad_sample_mode": "hooks"},
    "per layer": {"clipping": "per_layer", "max_grad_norm": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]},
    "per group": {"clipping": "per_group", "max_grad_norm": {"0.*": 0.1, "*": 0.3}},
    "automatic": {"clipping": "automatic"},
    "adaptive": {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 1.0,
        "min_clipbound": 1e-3, "unclipped_num_std": 2.0,
    },
    "sum": {"loss_reduction": "sum", "criterion": nn.CrossEntropyLoss(reduction="sum")},
}  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS)


def model(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 3))


def begin(way: str = "in place", **changes: Any) -> tuple[nn.Module, Any]:
    mode = {"grad_sample_mode": "auto"} | WAYS[way] | changes
    return start(mode.pop("grad_sample_mode"), model=mode.pop("model", None) or model(), **mode)


def endless(training: Any) -> Any:
    return itertools.chain.from_iterable(training[2] for _ in itertools.count())


def step(training: Any, batch: Any) -> None:
    training[1].zero_grad()
    F.cross_entropy(training[0](batch[0]), batch[1], reduction=training[1].loss_reduction).backward()
    training[1].step()


def steps_until_refused(private: tuple[nn.Module, Any], says: str, most: int) -> int:
    """Steps up to the one that is refused, which moves nothing, is not accounted and leaves no gradient."""
    module, training = private
    for number, batch in enumerate(endless(training), 1):
        before, counted = values(module), training.privacy_engine.accountant.history.copy()
        try:
            step(training, batch)
        except dpfix.NoiseError as error:
            assert says in str(error), error
            assert torch.equal(values(module), before) and training.privacy_engine.accountant.history == counted
            assert all(p.grad is None and p.summed_grad is None for p in module.parameters())
            return number
        assert number < most, "nothing was noticed"
    raise AssertionError


Change = Callable[[list[nn.Parameter], list[Tensor]], None]


def after_noise(training: Any, change: Change) -> None:
    """Add noise wrongly: ``change`` gets the parameters, with sum and noise in ``p.grad``, and the sums without noise."""
    optimizer = training[1]
    add_noise = optimizer.add_noise

    def wrong() -> None:
        sums = [p.summed_grad.clone() for p in optimizer.params]
        add_noise()
        change(optimizer.params, sums)

    optimizer.add_noise = wrong


def scaled(by: float, only: int | None = None) -> Change:
    def change(params: list[nn.Parameter], sums: list[Tensor]) -> None:
        for number, (p, total) in enumerate(zip(params, sums, strict=True)):
            if only in (None, number):
                p.grad = total + (p.grad - total) * by

    return change


def twice(params: list[nn.Parameter], sums: list[Tensor]) -> None:
    for p in params:
        p.grad += torch.randn_like(p)


def shared(params: list[nn.Parameter], sums: list[Tensor]) -> None:
    """The biases of the two hidden layers get the same noise."""
    params[3].grad = sums[3] + params[1].grad - sums[1]


MUTATIONS: dict[str, tuple[Change, str, int]] = {
    "5 % less": (scaled(0.95), "times noise_multiplier * max_grad_norm", 12),
    "5 % more": (scaled(1.05), "times noise_multiplier * max_grad_norm", 12),
    "forgotten on a weight": (scaled(0.0, only=2), "missing, or less than 1 % of noise_multiplier", 1),
    "forgotten on a bias of three": (scaled(0.0, only=5), "missing, or less than 1 % of noise_multiplier", 2),
    "twice": (twice, "about 1.4 times noise_multiplier * max_grad_norm", 1),
    "divided by the batch size": (scaled(1 / 8), "noise_multiplier * max_grad_norm", 1),
    "times the batch size": (scaled(8.0), "about 4 times noise_multiplier * max_grad_norm", 1),
    "shared by two parameters": (shared, "is that of the same release on parameter `0.bias`", 1),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_noise_is_refused(mutation: str) -> None:
    """The numbers of steps follow from those in ``SizeEvidence``: here 2,755 numbers are looked at in every step."""
    change, says, most = MUTATIONS[mutation]
    private = begin()
    after_noise(private[1], change)
    assert steps_until_refused(private, says, most + 1) <= most


@every_way
def test_wrong_noise_is_refused_in_every_way(way: str) -> None:
    private = begin(way)
    after_noise(private[1], scaled(0.0, only=3))
    assert steps_until_refused(private, "the noise on parameter `2.bias` of Sequential is missing", 1) == 1


@pytest.mark.parametrize("way", ["in place", "Opacus's hooks", "adaptive"])
def test_a_patched_torch_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normal, in_place = torch.normal, Tensor.normal_
    private = begin(way)
    monkeypatch.setattr(torch, "normal", lambda *args, **more: normal(*args, **more) * 0.9)
    monkeypatch.setattr(Tensor, "normal_", lambda *args, **more: in_place(*args, **more).mul_(0.9))
    assert steps_until_refused(private, "about 0.9 times", 4) <= 3


def test_a_wrong_scale_is_noticed() -> None:
    """The sum without its noise, too: what is released is then another sum."""
    private = begin()
    optimizer = private[1][1]
    scale_grad = optimizer.scale_grad

    def wrong() -> None:
        scale_grad()
        scale_grad()

    optimizer.scale_grad = wrong
    assert steps_until_refused(private, "noise_multiplier * max_grad_norm", 2) == 1


def test_noise_that_becomes_wrong_late_is_found_at_once() -> None:
    module, training = begin()
    for batch in itertools.islice(endless(training), 60):
        step(training, batch)
    after_noise(training, scaled(0.0, only=3))
    assert steps_until_refused((module, training), "`2.bias`", 1) == 1


class Sometimes:
    """Changes the noise of the steps for which something holds."""

    def __init__(self, change: Change, when: Callable[[int], bool]) -> None:
        self.change, self.when, self.step = change, when, 0

    def __call__(self, params: list[nn.Parameter], sums: list[Tensor]) -> None:
        self.step += 1
        if self.when(self.step):
            self.change(params, sums)


def found_after(change: Change, when: Callable[[int], bool], made: nn.Module) -> int:
    """Steps from the first one with wrong noise, the 21st, to the one that is refused."""
    private = begin(model=made)
    after_noise(private[1], Sometimes(change, lambda step: step > 20 and when(step - 21)))
    return steps_until_refused(private, "noise_multiplier * max_grad_norm", 70) - 20


@pytest.mark.parametrize("every", [1, 2, 8])
def test_noise_that_is_missing_on_seven_numbers_is_found_at_once(every: int) -> None:
    tiny = nn.Sequential(nn.Linear(6, 7), nn.ELU(), nn.Linear(7, 3))
    assert found_after(scaled(0.0, only=1), lambda step: step % every == 0, tiny) == 1


@pytest.mark.parametrize("wrong", [(0.7, 1.229), (0.5, 1.0)], ids=["sizes that average out", "every second step"])
def test_noise_of_changing_size_is_found_with_the_step_that_looks_at_all_of_it(wrong: tuple[float, float]) -> None:
    def change(params: list[nn.Parameter], sums: list[Tensor]) -> None:
        scaled(wrong[when.step % 2])(params, sums)

    when = Sometimes(change, lambda step: step > 20)
    private = begin(model=model(80))
    after_noise(private[1], when)
    assert steps_until_refused(private, "noise_multiplier * max_grad_norm", 29) <= 28


@pytest.mark.filterwarnings("ignore:1 draw.s. of the data_loader were skipped")
def test_a_step_that_is_interrupted_while_it_judges_is_judged_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    training = begin()[1]
    rounds(training, 23)
    judge = ProvenNoise._judge

    def interrupted(self: ProvenNoise) -> None:
        monkeypatch.setattr(ProvenNoise, "_judge", judge)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProvenNoise, "_judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rounds(training, 20)
    rounds(training, 20)


def test_a_training_without_its_noise_stays_refused() -> None:
    private = begin()
    add_noise = private[1][1].add_noise
    after_noise(private[1], scaled(0.5))
    assert steps_until_refused(private, "about 0.5 times", 1) == 1
    private[1][1].add_noise = add_noise
    assert steps_until_refused(private, "about 0.5 times", 1) == 1


def test_noise_is_looked_at_without_the_accountants_hook() -> None:
    private = begin()
    after_noise(private[1], scaled(0.5))
    private[1][1].step_hook = lambda optimizer: None
    assert steps_until_refused(private, "about 0.5 times", 1) == 1


# ------------------------------------------------------------------ noise that was there before


@pytest.mark.parametrize("way", ["in place", "Opacus's hooks", "per layer"])
def test_a_seed_that_is_used_again_is_refused(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    module, training = begin(way, noise_generator=generator)
    for batch in itertools.islice(endless(training), 5):
        step(training, batch)
    generator.manual_seed(0)
    private = module, training
    assert steps_until_refused(private, "in release 6 is that of release 1.", 1) == 1
    assert steps_until_refused(private, "in release 6 is that of release 2.", 1) == 1


def test_noise_of_one_parameter_that_comes_again_is_refused() -> None:
    kept: list[Tensor] = []

    def frozen(params: list[nn.Parameter], sums: list[Tensor]) -> None:
        kept.append(params[4].grad - sums[4])
        params[4].grad = sums[4] + kept[0]

    private = begin()
    after_noise(private[1], frozen)
    assert steps_until_refused(private, "parameter `4.weight` of Sequential in release 2 is that of release 1.", 2) == 2


def test_noise_of_a_few_numbers_that_comes_again_is_refused() -> None:
    """No parameter has eight numbers; all of them together do."""
    generator = torch.Generator()
    tiny = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3))
    module, training = begin(model=tiny, noise_generator=generator)
    after_noise(training, lambda params, sums: None)
    generator.manual_seed(0)
    step(training, next(iter(training[2])))
    generator.manual_seed(0)
    assert steps_until_refused((module, training), "in release 2 is that of release 1", 1) == 1


# ------------------------------------------------------------------ right noise


def rounds(training: Any, number: int = 40) -> None:
    for batch in itertools.islice(endless(training), number):
        step(training, batch)


@every_way
def test_right_noise_is_not_refused(way: str) -> None:
    rounds(begin(way)[1])


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-4, 1e4, 1e30, 1e-36])
@pytest.mark.parametrize("way", ["in place", "Opacus's hooks"])
def test_noise_of_any_size_is_not_refused(way: str, noise: float) -> None:
    """Tiny noise is lost in the rounding of the sum."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3 / max(1.0, noise))
    rounds(begin(way, model=module, optimizer=optimizer, noise_multiplier=noise)[1])


def test_schedulers_and_hooks_may_change_noise_and_gradients() -> None:
    training = begin()[1]
    optimizer = training[1]
    noise, clip = ExponentialNoise(optimizer, gamma=0.9), ExponentialGradClip(optimizer, gamma=0.9)

    def hook(_: Any) -> None:
        for p in optimizer.params:
            p.grad = p.grad * 3 + 1

    optimizer.attach_step_hook(hook)
    for batch in itertools.islice(endless(training), 20):
        step(training, batch)
        noise.step()
        clip.step()
        optimizer.expected_batch_size += 1


def test_several_iterations_empty_draws_and_logical_batches() -> None:
    sparse = begin(data_loader=DataLoader(points(), batch_size=1))[1]
    rounds(sparse)
    training = begin(data_loader=DataLoader(points(), batch_size=12))[1]
    for _ in range(10):
        with BatchMemoryManager(data_loader=training[2], max_physical_batch_size=4, optimizer=training[1]) as loader:
            for batch in loader:
                step(training, batch)
    accumulated = begin("Opacus's hooks", poisson_sampling=False)[1]
    batches = endless(accumulated)
    for _ in range(10):
        accumulated[1].zero_grad()
        for batch in itertools.islice(batches, 3):
            loss_of(accumulated, batch).backward()
        accumulated[1].step()


def test_wrong_noise_on_a_logical_batch_is_refused() -> None:
    module, training = begin(data_loader=DataLoader(points(), batch_size=12))
    after_noise(training, scaled(0.0, only=2))
    before = values(module)
    with (
        pytest.raises(dpfix.NoiseError, match="missing"),
        BatchMemoryManager(data_loader=training[2], max_physical_batch_size=4, optimizer=training[1]) as loader,
    ):
        for batch in loader:
            step(training, batch)
    assert torch.equal(values(module), before)


def test_a_clip_norm_that_is_lowered_inside_a_logical_batch_is_refused() -> None:
    """The noise is for the lower one; the first part of the sum was clipped to the higher one."""
    training = begin(data_loader=DataLoader(points(), batch_size=12))[1]
    scheduler = ExponentialGradClip(training[1], gamma=0.5)
    with (
        pytest.raises(dpfix.NoiseError, match=r"about 0\.\d+ times|missing"),
        BatchMemoryManager(data_loader=training[2], max_physical_batch_size=4, optimizer=training[1]) as loader,
    ):
        for batch in loader:
            step(training, batch)
            scheduler.step()


def test_gradients_of_other_layouts() -> None:
    """Sums in channels-last memory have their numbers at the same places as gradients that are contiguous."""
    image = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 3))
    training = begin("Opacus's hooks", model=image.to(memory_format=torch.channels_last))[1]
    clip = training[1].clip_and_accumulate

    def channels_last() -> None:
        clip()
        weight = training[1].params[0]
        weight.summed_grad = weight.summed_grad.to(memory_format=torch.channels_last)

    training[1].clip_and_accumulate = channels_last
    rounds(training)


def test_parameters_of_several_precisions() -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.arange(5.0, dtype=torch.float64) + 10, "c": torch.arange(2.0) + 20}
    numbers = Numbers({name: nn.Parameter(t) for name, t in tensors.items()})
    numbers.move()
    assert numbers.names == ["a", "c", "b"]
    numbers.copy([tensors[name] for name in numbers.names], after=True)
    assert numbers.values()[1].tolist() == [0, 1, 2, 20, 21, 10, 11, 12, 13, 14]
    assert [numbers.names[numbers.part_of(i)] for i in (0, 2, 3, 4, 5, 9)] == ["a", "a", "c", "c", "b", "b"]


def test_all_places_of_a_large_parameter_are_looked_at() -> None:
    weight = torch.arange(6000.0).view(60, 100)
    numbers = Numbers({"weight": nn.Parameter(weight)})
    seen = np.zeros(6000)
    for _ in range(200):
        numbers.move()
        numbers.copy([weight], after=False)
        found = numbers.values()[0]
        assert len(np.unique(found)) == len(found) == 4096
        seen[found.astype(int)] += 1
    assert seen.min() > 0 and seen[0] == 200


def test_a_gradient_that_is_missing_is_refused() -> None:
    def forget(params: list[nn.Parameter], sums: list[Tensor]) -> None:
        params[1].grad = None

    private = begin()
    private[1][1].scale_grad = lambda: None
    after_noise(private[1], forget)
    assert steps_until_refused(private, "`0.bias` of Sequential is not known, because p.grad is None", 1) == 1


def test_parameters_without_numbers_are_left_out() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing, self.net = nn.Parameter(torch.empty(0)), model()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.nothing.sum()

    rounds(begin("sum", model=Empty(), grad_sample_mode="auto")[1], 10)


def test_a_training_with_a_seed_may_go_back_to_a_checkpoint(tmp_path: Any) -> None:
    training = begin(seed=1)[1]
    engine = training.privacy_engine
    engine.save_checkpoint(path=tmp_path / "c.pt", module=training[0], optimizer=training[1])
    for _ in range(2):
        rounds(training, 3)
        with pytest.warns(dpfix.DPFixWarning, match="earlier one"):
            engine.load_checkpoint(path=tmp_path / "c.pt", module=training[0], optimizer=training[1])
