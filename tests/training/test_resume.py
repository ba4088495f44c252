"""A private training goes on from any step, to the last bit where the call has a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpfix
from tests.training.test_checkpoint import begin

STEPS = 6
"""In a pass."""
ADAPTIVE = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
    "min_clipbound": 0.01, "unclipped_num_std": 1.0, "mode": "hooks",
}  # fmt: skip
WORKERS = {
    "no workers": {},
    "workers": {"num_workers": 2},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
    "a generator for the workers": {"num_workers": 1, "own": True},
}


class Augmented(Dataset[Any]):
    """Records with a random change, which comes from the generators of the process that reads them."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(24, 6, generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(6), index % 3


def start(own: bool = False, batch_size: int = 4, **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    loading = {name: changes.pop(name) for name in ("num_workers", "persistent_workers") if name in changes}
    if own:
        loading["generator"] = torch.Generator().manual_seed(9)
    loader = DataLoader(Augmented(), batch_size=batch_size, **loading)
    return begin(changes.pop("mode", "bookkeeping"), data_loader=loader, **changes)


def objects(training: dpfix.PrivateTraining) -> dict[str, Any]:
    return {"module": training[0], "optimizer": training[1], "data_loader": training[2]}


def go(training: dpfix.PrivateTraining, passes: int, save: tuple[int, Path] | None = None) -> list[int]:
    """Train, and save after a step; the number of batches in each pass."""
    model, optimizer, loader = training
    made, sizes = 0, []
    for _ in range(passes):
        sizes.append(0)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            made += 1
            sizes[-1] += 1
            if save and made == save[0]:
                training.privacy_engine.save_checkpoint(path=save[1], **objects(training))
    return sizes


def step(training: dpfix.PrivateTraining, batch: Any) -> None:
    training[1].zero_grad()
    nn.functional.cross_entropy(training[0](batch[0]), batch[1]).backward()
    training[1].step()


def save(training: dpfix.PrivateTraining, file: Path) -> None:
    training.privacy_engine.save_checkpoint(path=file, **objects(training))


def from_file(file: Path, **given: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    model, resumed = start(**given)
    resumed.privacy_engine.load_checkpoint(path=file, **objects(resumed))
    return model, resumed


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("workers", "step", "changes"),
    [
        *(("no workers", step, {}) for step in (1, 4, 5, 6, 9, 12)),
        *((kind, step, {}) for kind in ("workers", "persistent workers") for step in (4, 6, 9)),
        ("a generator for the workers", 8, {}),
        ("no workers", 8, ADAPTIVE),
        ("workers", 8, ADAPTIVE),
        ("no workers", 8, {"mode": "microbatch"}),
    ],
)
def test_it_goes_on_from_any_step(workers: str, step: int, changes: dict[str, Any], tmp_path: Path) -> None:
    given = {"seed": 1, **WORKERS[workers], **changes}
    model, training = start(**given)
    assert go(training, 3, (step, tmp_path / "run.pt")) == [STEPS] * 3
    following = torch.rand(1)

    torch.manual_seed(99)
    again, resumed = start(**given)
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
    assert go(resumed, 3 - step // STEPS)[0] == (-step % STEPS or STEPS)
    assert resumed.privacy_engine.accountant.history == training.privacy_engine.accountant.history
    assert equal(model, again) and torch.equal(torch.rand(1), following)
    assert resumed[1].max_grad_norm == training[1].max_grad_norm


def test_a_resumed_training_can_be_resumed(tmp_path: Path) -> None:
    """Twice in one pass; the second file stands further on in the same pass."""
    given = {"seed": 1, "num_workers": 1}
    model, training = start(**given)
    go(training, 2, (2, tmp_path / "first.pt"))
    for file, next_file, step in (("first.pt", "second.pt", 2), ("second.pt", "third.pt", 9)):
        again, resumed = start(**given)
        resumed.privacy_engine.load_checkpoint(path=tmp_path / file, **objects(resumed))
        go(resumed, 2, (step, tmp_path / next_file))
        assert equal(model, again)


def test_without_a_seed_the_rest_of_the_pass_is_drawn_anew(tmp_path: Path) -> None:
    _, training = start()
    go(training, 1, (4, tmp_path / "run.pt"))
    assert torch.load(tmp_path / "run.pt", weights_only=True)["dpfix"]["pass"].keys() == {"done", "of"}
    found = []
    for _ in range(2):
        again, resumed = start()
        resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
        assert go(resumed, 2) == [2, STEPS]
        found.append(again)
    assert not equal(*found)


def test_a_pass_that_was_left_is_not_gone_on_with(tmp_path: Path) -> None:
    """The loop was left by break; the run that is not stopped begins a new pass, and so does the resumed one."""

    def left(training: dpfix.PrivateTraining) -> None:
        model, optimizer, loader = training
        for number, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if number == 2:
                break

    model, training = start(seed=1)
    left(training)
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", **objects(training))
    assert go(training, 1) == [STEPS]
    again, resumed = start(seed=1)
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
    assert go(resumed, 1) == [STEPS] and equal(model, again)


def test_a_batch_that_was_delivered_and_not_yet_released_comes_again(tmp_path: Path) -> None:
    model, training = start(seed=1)
    _, optimizer, loader = training
    for number, (x, y) in enumerate(loader):
        if number == 3:
            training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", **objects(training))
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    _, resumed = start(seed=1)
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
    assert go(resumed, 1) == [STEPS - 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_physical_batches_go_on_at_the_next_logical_one(workers: int, tmp_path: Path) -> None:
    def manage(training: dpfix.PrivateTraining, save: bool) -> int:
        model, optimizer, loader = training
        released = 0
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                released += not optimizer._is_last_step_skipped
                if save and released == 2 and not optimizer._is_last_step_skipped:
                    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", **objects(training))
        return released

    model, training = start(batch_size=8, seed=1, num_workers=workers)
    assert manage(training, save=True) == 3
    again, resumed = start(batch_size=8, seed=1, num_workers=workers)
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
    assert manage(resumed, save=False) == 1 and equal(model, again)


def test_a_loader_with_other_passes_is_told(tmp_path: Path) -> None:
    _, training = start()
    go(training, 1, (4, tmp_path / "run.pt"))
    _, other = start(batch_size=8)
    with pytest.warns(dpfix.DPFixWarning) as warned:
        other.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(other))
    assert any("in a pass of 6 batches, and the loader of this call has 3" in str(w.message) for w in warned)
    assert go(other, 1) == [3]


def test_other_settings_of_adaptive_clipping_are_told(tmp_path: Path) -> None:
    _, training = start(**ADAPTIVE)
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", **objects(training))
    _, other = start(**ADAPTIVE | {"unclipped_num_std": 2.0})
    with pytest.warns(
        dpfix.DPFixWarning, match=r"unclipped_num_std was 1.0 when it was saved, and is 2.0 from here on"
    ):
        other.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(other))


# ------------------------------------------------------------------ other passes, and loops that do not step on every batch


@pytest.mark.filterwarnings("ignore:.*draw.s. of the data_loader were skipped")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_without_steps_takes_nothing_from_the_one_it_interrupts(
    workers: int, whole: bool, tmp_path: Path
) -> None:
    """An evaluation over the private loader, to its end or not, in the middle of a pass and before the file is written."""
    given = {"seed": 1, "num_workers": workers}
    model, training = start(**given)
    for number, batch in enumerate(training[2]):
        step(training, batch)
        if number == 2:
            for _ in training[2]:
                if not whole:
                    break
            save(training, tmp_path / "run.pt")
    go(training, 1)
    again, resumed = from_file(tmp_path / "run.pt", **given)
    assert go(resumed, 2) == [STEPS - 3, STEPS] and equal(model, again)


@pytest.mark.filterwarnings("ignore:.*draw.s. of the data_loader were skipped")
def test_a_pass_without_steps_does_not_use_up_the_rest(tmp_path: Path) -> None:
    model, training = start(seed=1)
    go(training, 1, (2, tmp_path / "run.pt"))
    again, resumed = from_file(tmp_path / "run.pt", seed=1)
    assert sum(1 for _ in resumed[2]) == STEPS - 2
    assert go(resumed, 1) == [STEPS - 2] and equal(model, again)


@pytest.mark.filterwarnings("ignore:.*draw.s. of the data_loader were skipped")
def test_batches_that_the_loop_leaves_out_do_not_come_again(tmp_path: Path) -> None:
    def left_out(training: dpfix.PrivateTraining, first: int, file: Path | None = None) -> None:
        for number, batch in enumerate(training[2], first):
            if number == 1:
                continue
            step(training, batch)
            if number == 3 and file:
                save(training, file)

    model, training = start(seed=1)
    left_out(training, 0, tmp_path / "run.pt")
    again, resumed = from_file(tmp_path / "run.pt", seed=1)
    left_out(resumed, 4)
    assert equal(model, again)


def test_a_batch_that_waits_in_a_loop_that_looks_ahead_comes_again(tmp_path: Path) -> None:
    model, training = start(seed=1, num_workers=1)
    batches = iter(training[2])
    ahead = next(batches)
    for number in range(STEPS):
        batch, ahead = ahead, next(batches, None)
        step(training, batch)
        if number == 1:
            save(training, tmp_path / "run.pt")
    again, resumed = from_file(tmp_path / "run.pt", seed=1, num_workers=1)
    assert go(resumed, 1) == [STEPS - 2] and equal(model, again)


def test_a_batch_that_is_kept_for_later_comes_again(tmp_path: Path) -> None:
    """The loop has stepped on later ones already; what was released before it is not read again."""
    _, training = start(seed=1)
    batches = iter(training[2])
    step(training, next(batches))
    kept = next(batches)
    step(training, next(batches))
    save(training, tmp_path / "run.pt")
    _, resumed = from_file(tmp_path / "run.pt", seed=1)
    assert go(resumed, 1) == [STEPS - 1]
    step(training, kept)
    save(training, tmp_path / "run.pt")
    _, resumed = from_file(tmp_path / "run.pt", seed=1)
    assert go(resumed, 1) == [STEPS - 3]


def test_a_file_that_is_written_at_once_again_holds_the_same_place(tmp_path: Path) -> None:
    model, training = start(seed=1)
    go(training, 2, (8, tmp_path / "first.pt"))
    save(from_file(tmp_path / "first.pt", seed=1)[1], tmp_path / "second.pt")
    again, resumed = from_file(tmp_path / "second.pt", seed=1)
    assert go(resumed, 1) == [STEPS - 2] and equal(model, again)


def test_draws_of_a_resumed_pass_are_counted_on(tmp_path: Path) -> None:
    _, training = start(seed=1)
    numbers = []
    for batch in training[2]:
        numbers.append(training[2].ledger.present().number)
        step(training, batch)
        if len(numbers) == 4:
            save(training, tmp_path / "run.pt")
    _, resumed = from_file(tmp_path / "run.pt", seed=1)
    for batch in resumed[2]:
        numbers.append(resumed[2].ledger.present().number)
        step(resumed, batch)
    assert numbers == [1, 2, 3, 4, 5, 6, 5, 6]
    assert resumed.privacy_engine.accountant.history == training.privacy_engine.accountant.history


@pytest.mark.filterwarnings("ignore:optimizer. the state that was loaded is an earlier one")
def test_a_load_that_fails_takes_no_release_and_no_place(tmp_path: Path) -> None:
    """It fails at the very end; what was released and the place in the present pass are as before."""
    _, training = start(seed=1)
    go(training, 1, (4, tmp_path / "run.pt"))
    _, other = start(seed=1)
    batches = iter(other[2])
    step(other, next(batches))
    before = other.privacy_engine.accountant.history[:], other[2].ledger.position.state()["done"]
    draws = other[1].randomness.draws

    def fails_once(state: Any) -> None:
        del draws.go_on
        raise ValueError("late")

    draws.go_on = fails_once
    with pytest.raises(dpfix.CheckpointError, match="late"):
        other.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(other))
    assert (other.privacy_engine.accountant.history, other[2].ledger.position.state()["done"]) == before
    step(other, next(batches))
    assert other.privacy_engine.accountant.history[0][-1] == 2
