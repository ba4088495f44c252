"""A private training that is saved and loaded goes on with the same numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.cases import Recurrent
from tests.helpers import points, setting


def begin(mode: str = "bookkeeping", **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    given = setting(model, optimizer=optimizer, grad_sample_mode=mode) | changes
    training = dpfix.make_private_safe(**given)
    return model, training


def epoch(model: nn.Module, training: dpfix.PrivateTraining) -> None:
    _, optimizer, loader = training
    looping = training[0] if isinstance(training[0], nn.Module) else model
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(looping(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["bookkeeping", "microbatch", "hooks"])
@pytest.mark.parametrize(
    ("wrap", "own"), [(True, False), (False, True)], ids=["wrapped", "own generators, not wrapped"]
)
def test_the_training_goes_on_exactly(mode: str, wrap: bool, own: bool, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, dpfix.PrivateTraining]:
        extra: dict[str, Any] = {"wrap_model": wrap, "seed": 1}
        if own:
            extra["noise_generator"] = torch.Generator().manual_seed(1)
            extra["data_loader"] = DataLoader(points(), batch_size=8, generator=torch.Generator().manual_seed(2))
        return begin(mode, **extra)

    torch.manual_seed(0)
    model, training = fresh()
    epoch(model, training)
    given = {"path": tmp_path / "run.pt", "module": training[0], "optimizer": training[1], "data_loader": training[2]}
    training.privacy_engine.save_checkpoint(**given)
    epoch(model, training)
    wanted = (random.random(), np.random.rand(), torch.rand(1))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    again, resumed = fresh()
    given |= {"module": resumed[0], "optimizer": resumed[1], "data_loader": resumed[2]}
    resumed.privacy_engine.load_checkpoint(**given)
    epoch(again, resumed)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert training.privacy_engine.accountant.history == resumed.privacy_engine.accountant.history
    assert training.get_epsilon(1e-3) == resumed.get_epsilon(1e-3)
    first, second = (t[1].original_optimizer.state_dict()["state"] for t in (training, resumed))
    assert all(torch.equal(first[i]["exp_avg_sq"], second[i]["exp_avg_sq"]) for i in first)
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


def test_weights_are_saved_under_the_original_keys(tmp_path: Path) -> None:
    """The file's weights load into the original, also where Opacus's hooks needed another layer."""
    original = Recurrent(nn.GRU(4, 5, batch_first=True), 5)
    model = Recurrent(nn.GRU(4, 5, batch_first=True), 5)
    loader = DataLoader(TensorDataset(torch.randn(8, 5, 4), torch.arange(8) % 3), batch_size=4)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader, grad_sample_mode="hooks"))
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", module=training[0], optimizer=training[1])
    dpfix.load_pretrained(original, tmp_path / "run.pt")
    assert dpfix.verify_equivalence(original, training[0], torch.randn(3, 5, 4), mapping={"": ""})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    epoch(model, training)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 2 steps were released since"):
        training.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", module=training[0], optimizer=training[1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_engine_and_other_settings_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The noise that a call asks for is the noise it gets: a file never lowers it, also not one that a scheduler moved."""
    _, training = begin("bookkeeping")
    ExponentialNoise(training[1], gamma=0.5).step()
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", module=training[0], optimizer=training[1])
    _, other = begin("microbatch", noise_multiplier=2.0)
    expected = r"noise_multiplier was 0.5 when it was saved, and is 2.0 from here on, as this call says"
    with pytest.warns(dpfix.DPFixWarning, match=expected):
        other.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", module=other[0], optimizer=other[1])
    assert "pass grad_sample_mode='bookkeeping'" in caplog.text
    assert other[1].noise_multiplier == 2.0


class Gated(nn.Module):
    """A shared layer whose second result is cut out of the graph, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.cuts = nn.Linear(6, 6), nn.Linear(6, 3), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen, other = self.first(x), self.first(x.flip(1))
        return self.last(seen + (other.detach() if self.cuts else other))


def test_a_region_that_was_given_up_stays_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fresh() -> tuple[Gated, dpfix.PrivateTraining]:
        torch.manual_seed(5)
        model = Gated()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, dpfix.make_private_safe(**setting(model, optimizer=optimizer, poisson_sampling=False, seed=1))

    model, training = fresh()
    assert len(training.plan.no_grad_regions) == 1
    model.cuts = False
    with pytest.warns(dpfix.DPFixWarning, match="This step is not applied"):
        epoch(model, training)
    assert training.plan.no_grad_regions == ()
    given = {"path": tmp_path / "run.pt", "module": training[0], "optimizer": training[1]}
    training.privacy_engine.save_checkpoint(**given)
    epoch(model, training)

    again, resumed = fresh()
    again.cuts = False
    resumed.privacy_engine.load_checkpoint(**given | {"module": resumed[0], "optimizer": resumed[1]})
    assert resumed.plan.no_grad_regions == () and "ran with its graph" in caplog.text
    epoch(again, resumed)  # without a step that is not applied
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_another_plan_is_refused(tmp_path: Path) -> None:
    _, training = begin()
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", module=training[0], optimizer=training[1])
    _, other = begin(criterion=nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum")
    before = {k: v.clone() for k, v in other[0].state_dict().items()}
    with pytest.raises(dpfix.CheckpointError, match="the loss reduction was 'mean' there"):
        other.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", module=other[0], optimizer=other[1])
    assert all(torch.equal(v, before[k]) for k, v in other[0].state_dict().items())


def test_a_scheduler_goes_on(tmp_path: Path) -> None:
    _, training = begin()
    scheduler = ExponentialNoise(training[1], gamma=0.5)
    scheduler.step()
    given = {"path": tmp_path / "run.pt", "optimizer": training[1], "noise_scheduler": scheduler}
    training.privacy_engine.save_checkpoint(module=training[0], **given)
    _, again = begin()
    resumed = ExponentialNoise(again[1], gamma=0.5)
    given |= {"optimizer": again[1], "noise_scheduler": resumed}
    with pytest.warns(
        dpfix.DPFixWarning, match=r"noise_multiplier=0.5 is taken from the checkpoint, where a scheduler"
    ):
        again.privacy_engine.load_checkpoint(module=again[0], **given)
    resumed.step()
    assert again[1].noise_multiplier == 0.25


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    _, training = begin()
    file = tmp_path / "run.pt"
    training.privacy_engine.save_checkpoint(path=file, module=training[0], checkpoint_dict={"model": nn.Linear(1, 1)})
    with pytest.raises(dpfix.CheckpointError, match="would run code from the file"):
        training.privacy_engine.load_checkpoint(path=file, module=training[0])


def test_what_is_no_checkpoint_or_another_accountants_is_refused(tmp_path: Path) -> None:
    model, training = begin()
    file = tmp_path / "run.pt"
    torch.save(model.state_dict(), file)
    with pytest.raises(dpfix.CheckpointError, match=r"For weights alone there is dpfix.load_pretrained"):
        training.privacy_engine.load_checkpoint(path=file, module=training[0])
    training.privacy_engine.save_checkpoint(path=file, module=training[0])
    other = dpfix.SafePrivacyEngine(accountant="rdp")
    with pytest.raises(dpfix.CheckpointError, match=r"accountant is 'prv', and this privacy engine's is 'rdp'"):
        other.load_checkpoint(path=file, module=training[0])


def test_a_checkpoint_of_opacus_is_read(tmp_path: Path) -> None:
    model, training = begin()
    epoch(model, training)
    plain = PrivacyEngine()
    plain.accountant = training.privacy_engine.accountant
    plain.save_checkpoint(path=tmp_path / "run.pt", module=training[0], optimizer=training[1])
    again, resumed = begin()
    with pytest.warns(dpfix.DPFixWarning, match="saved by Opacus"):
        resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", module=resumed[0], optimizer=resumed[1])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert len(resumed.privacy_engine.accountant) == len(training.privacy_engine.accountant) > 0


# ------------------------------------------------------------------ noise and draws


def saved_after_an_epoch(path: Path, **changes: Any) -> dict[str, Any]:
    model, training = begin(**changes)
    epoch(model, training)
    training.privacy_engine.save_checkpoint(path=path, module=training[0], optimizer=training[1])
    return torch.load(path, weights_only=True)


def resumed(path: Path, **changes: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """What is drawn next, and the weights after another epoch."""
    model, training = begin(**changes)
    given = {"module": training[0], "optimizer": training[1], "data_loader": training[2]}
    training.privacy_engine.load_checkpoint(path=path, **given)
    drawn = [list(training[2].batch_sampler) for _ in range(3)]
    epoch(model, training)
    return drawn, [v.clone() for v in model.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_training_that_is_resumed_twice_never_repeats_noise_or_draws(tmp_path: Path) -> None:
    """Two learning rates from one checkpoint: equal noise would show the difference of the two sums."""
    file = tmp_path / "run.pt"
    assert saved_after_an_epoch(file)["dpfix"]["randomness"] == {}
    first, second = resumed(file), resumed(file)
    assert first[0] != second[0] and not equal(first[1], second[1])


def test_a_training_with_a_seed_is_resumed_twice_with_equal_noise_and_draws(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    saved_after_an_epoch(file, seed=np.int64(7))
    first, second = resumed(file, seed=7), resumed(file, seed=7)
    assert first[0] == second[0] and equal(first[1], second[1])


@pytest.mark.parametrize(("saved", "here"), [(7, 8), (7, None), (None, 7)])
def test_another_seed_than_the_saved_one_is_told(saved: int | None, here: int | None, tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    saved_after_an_epoch(file, seed=saved)
    with pytest.warns(dpfix.DPFixWarning, match="noise and draws do not go on with the same numbers"):
        drawn, _ = resumed(file, seed=here)
    _, anew = begin(seed=here)
    assert (drawn == [list(anew[2].batch_sampler) for _ in range(3)]) == (here is not None)


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It holds the generator of the draws, which was the loader's, and nothing of the training's own."""
    file = tmp_path / "run.pt"
    loader = DataLoader(points(), batch_size=8, generator=torch.Generator().manual_seed(2))
    content = saved_after_an_epoch(file)
    for later in ("randomness", "pass", "adaptive", "checksum"):
        del content["dpfix"][later]
    content["dpfix"]["generators"]["own"] = {"loader": loader.generator.get_state()}
    torch.save(content, file)
    first, second = resumed(file, data_loader=loader), resumed(file, data_loader=loader)
    assert first[0] != second[0] and not equal(first[1], second[1])


@pytest.mark.filterwarnings("ignore:checkpoint. max_grad_norm=.* is taken from the checkpoint")
def test_the_noise_that_goes_on_is_that_of_every_clipping(tmp_path: Path) -> None:
    adaptive = {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
        "min_clipbound": 0.01, "unclipped_num_std": 1.0, "mode": "hooks", "max_grad_norm": 1.0,
    }  # fmt: skip
    for changes in (adaptive, {"clipping": "per_layer", "max_grad_norm": [1.0] * 4, "mode": "hooks"}):
        saved_after_an_epoch(tmp_path / "run.pt", seed=7, **changes)
        first, second = (resumed(tmp_path / "run.pt", seed=7, **changes) for _ in range(2))
        assert first[0] == second[0] and equal(first[1], second[1])
