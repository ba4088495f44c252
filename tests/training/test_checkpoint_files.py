"""A checkpoint is there whole or as it was before, and is read whole or not at all."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialNoise, LambdaNoise
from torch import nn

import dpfix
from tests.helpers import generator_states, points, setting
from tests.training.test_checkpoint import begin, epoch

Content = dict[str, Any]
Change = Callable[[Content], None]

KILLED = 12
KILLS = """
import os, signal, sys, time, torch, dpfix
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 600), nn.ReLU(), nn.Linear(600, 2000), nn.ReLU(), nn.Linear(2000, 3))
training = dpfix.make_private_safe(
    module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
    data_loader=DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24) % 3), batch_size=8),
    noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="bookkeeping",
)
file = Path(sys.argv[1])

def save():
    training.privacy_engine.save_checkpoint(path=file, module=training[0], optimizer=training[1])

save()
begun = time.perf_counter()
for _ in range(3):
    save()
seconds = (time.perf_counter() - begun) / 3
lost = 0
for number in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        while True:
            save()
    time.sleep(seconds * (1 + number / 5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        training.privacy_engine.load_checkpoint(path=file, module=training[0], optimizer=training[1])
    except Exception as error:
        lost += 1
        save()
print(lost)
"""


def test_a_kill_while_saving_never_loses_the_earlier_file(tmp_path: Path) -> None:
    lost = lost_by_kills(tmp_path, KILLED)
    assert lost == 0, f"{lost} of {KILLED} kills lost the checkpoint"


def lost_by_kills(folder: Path, kills: int) -> int:
    """How many of so many kills while saving leave no file that can be loaded."""
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(folder / "run.pt"), str(kills)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(dpfix.__file__).parents[1])},
    )
    return int(run.stdout)


# ------------------------------------------------------------------ writing


def save(training: dpfix.PrivateTraining, path: Any, **more: Any) -> None:
    training.privacy_engine.save_checkpoint(path=path, module=training[0], optimizer=training[1], **more)


def load(training: dpfix.PrivateTraining, path: Any, **more: Any) -> None:
    training.privacy_engine.load_checkpoint(path=path, module=training[0], optimizer=training[1], **more)


def test_what_cannot_be_saved_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    _, training = begin()
    file = tmp_path / "run.pt"
    save(training, file)
    before = file.read_bytes()
    with pytest.raises(dpfix.CheckpointError, match="could not be saved"):
        save(training, file, checkpoint_dict={"mine": lambda: None})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("path", [None, 5, b"run.pt", "no such folder/run.pt", "."])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    _, training = begin()
    for act in (save, load):
        with pytest.raises(dpfix.DPFixError, match="path"):
            act(training, path)


def test_a_missing_file_is_told_as_scripts_expect_it(tmp_path: Path) -> None:
    _, training = begin()
    with pytest.raises(FileNotFoundError, match=r"run\.pt.*there is no file of that name") as caught:
        load(training, tmp_path / "run.pt")
    assert isinstance(caught.value, dpfix.CheckpointError)


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    _, training = begin()
    file, link = tmp_path / "run.pt", tmp_path / "latest.pt"
    save(training, file)
    file.chmod(0o640)
    link.symlink_to(file)
    save(training, link)
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    load(training, link)
    save(training, "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_schedule_that_is_a_function_can_be_saved(tmp_path: Path) -> None:
    """The function stays with the script; the place in the schedule goes on."""

    def scheduled() -> tuple[dpfix.PrivateTraining, LambdaNoise]:
        _, training = begin()
        return training, LambdaNoise(training[1], noise_lambda=lambda step: 1 + step)

    training, scheduler = scheduled()
    scheduler.step()
    save(training, tmp_path / "run.pt", noise_scheduler=scheduler)
    again, resumed = scheduled()
    with pytest.warns(dpfix.DPFixWarning, match=r"noise_multiplier=2.0 is taken from the checkpoint"):
        load(again, tmp_path / "run.pt", noise_scheduler=resumed)
    resumed.step()
    assert again[1].noise_multiplier == 3.0


# ------------------------------------------------------------------ hostile files


class Target:
    """A private training, and what it consists of."""

    def __init__(self) -> None:
        self.model, self.training = begin(seed=1)
        self.scheduler = ExponentialNoise(self.training[1], gamma=1.0)
        epoch(self.model, self.training)

    def objects(self) -> dict[str, Any]:
        return {"data_loader": self.training[2], "noise_scheduler": self.scheduler}

    def disturb(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(1.0)
        for state in self.training[1].original_optimizer.state.values():
            state["exp_avg"] = state["exp_avg"] + 1
        torch.manual_seed(77)
        torch.rand(3)

    def state(self) -> Any:
        optimizer = self.training[1]
        kept = (
            dict(self.model.state_dict()),
            optimizer.original_optimizer.state_dict(),
            list(self.training.privacy_engine.accountant.history),
            (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size),
            {name: value for name, value in vars(self.scheduler).items() if name != "optimizer"},
            optimizer.randomness.state(),
            generator_states()[0::2],
            generator_states()[1][1].tolist(),
        )
        return copy.deepcopy(kept)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['DPFIX_BOMB'] = '1'",)


def weights_of(content: Content) -> dict[str, torch.Tensor]:
    return content["module_state_dict"]


def first_state(content: Content) -> dict[str, torch.Tensor]:
    return content["optimizer_state_dict"]["state"][0]


def _weights(value: Any) -> Change:
    return lambda content: weights_of(content).update({"0.weight": value})


def _history(*entry: Any) -> Change:
    return lambda content: content["privacy_accountant_state_dict"].update(history=[entry])


def _adam(name: str, value: Any) -> Change:
    return lambda content: first_state(content).update({name: value})


def _group(name: str, value: Any) -> Change:
    return lambda content: content["optimizer_state_dict"]["param_groups"][0].update({name: value})


def _scheduler(name: str, value: Any) -> Change:
    return lambda content: content["noise_scheduler_state_dict"].update({name: value})


def _entry(name: str, value: Any) -> Change:
    return lambda content: content.update({name: value})


NOT_LEGAL: dict[str, Change] = {
    "NaN weights": _weights(torch.full((8, 6), torch.nan)),
    "infinite weights": _weights(torch.full((8, 6), torch.inf)),
    "weights of another shape": _weights(torch.zeros(6, 8)),
    "weights of another dtype": _weights(torch.zeros(8, 6, dtype=torch.float64)),
    "whole numbers as weights": _weights(torch.zeros(8, 6, dtype=torch.int64)),
    "no weights": lambda content: weights_of(content).clear(),
    "weights in a list": _entry("module_state_dict", [1, 2]),
    "a number for weights": _weights(3.0),
    "negative steps": _history(1.0, 0.3, -5),
    "half a step": _history(1.0, 0.3, 2.5),
    "no steps": _history(1.0, 0.3, 0),
    "true steps": _history(1.0, 0.3, True),
    "negative noise": _history(-1.0, 0.3, 5),
    "NaN noise": _history(float("nan"), 0.3, 5),
    "infinite noise": _history(float("inf"), 0.3, 5),
    "noise in words": _history("1.0", 0.3, 5),
    "no rate": _history(1.0, 0.0, 5),
    "a rate above 1": _history(1.0, 7.0, 5),
    "too short an entry": _history(1.0, 0.3),
    "a history of numbers": lambda content: content["privacy_accountant_state_dict"].update(history=[1, 2]),
    "no history": lambda content: content["privacy_accountant_state_dict"].pop("history"),
    "an accountant that is none": _entry("privacy_accountant_state_dict", 4),
    "NaN momentum": _adam("exp_avg", torch.full((8, 6), torch.nan)),
    "momentum of another shape": _adam("exp_avg_sq", torch.zeros(3, 3)),
    "momentum in words": _adam("exp_avg", "much"),
    "NaN learning rate": _group("lr", float("nan")),
    "a learning rate in words": _group("lr", "1"),
    "no parameters": _group("params", []),
    "an optimizer that is none": _entry("optimizer_state_dict", [3]),
    "an optimizer without state": lambda content: content["optimizer_state_dict"].pop("state"),
    "a schedule that grows": _scheduler("gamma", float("inf")),
    "a schedule in words": _scheduler("last_epoch", "3"),
    "a schedule with a method": _scheduler("get_noise_multiplier", 1),
    "a scheduler that is none": _entry("noise_scheduler_state_dict", 3),
}  # fmt: skip
"""Changes after which a file is not that of any training, whether it has a checksum or not."""


def _added(name: str, value: Any) -> Change:
    return lambda content: content["dpfix"].update({name: value})


def _privacy(name: str, value: Any) -> Change:
    return lambda content: content["dpfix"]["privacy"].update({name: value})


ADDED_NOT_LEGAL: dict[str, Change] = {
    "noise 0 where it was positive": _privacy("noise_multiplier", [1.0, 0.0]),
    "negative noise now": _privacy("noise_multiplier", [1.0, -2.0]),
    "NaN noise now": _privacy("noise_multiplier", [1.0, float("nan")]),
    "no clip norm": _privacy("max_grad_norm", [1.0, 0.0]),
    "a clip norm in words": _privacy("max_grad_norm", [1.0, "2"]),
    "a batch of none": _privacy("expected_batch_size", [8, -8]),
    "one value only": _privacy("noise_multiplier", [1.0]),
    "privacy that is none": _added("privacy", 3),
    "no generators": lambda content: content["dpfix"].pop("generators"),
    "generators in words": _added("generators", "none"),
    "a generator of another kind": lambda content: content["dpfix"]["generators"].update(torch=torch.zeros(7)),
    "numpy of another kind": lambda content: content["dpfix"]["generators"].update(numpy=["MT19937", torch.zeros(2), 1, 0, 0.0]),
    "python of another kind": lambda content: content["dpfix"]["generators"].update(python=[3, [1, 2], None]),
    "noise from nowhere": lambda content: content["dpfix"]["randomness"].update(noise={"cpu": torch.zeros(3)}),
    "draws on a strange device": lambda content: content["dpfix"]["randomness"].update(draws={"moon": torch.zeros(3)}),
    "a plan that is none": _added("plan", 3),
    "a plan without an engine": lambda content: content["dpfix"]["plan"].pop("engine"),
    "an addition that is none": _entry("dpfix", 5),
}  # fmt: skip

OTHERS: dict[str, Any] = {
    "nothing": {}, "a list": [1], "a number": 3, "text": "text", "a tensor": torch.zeros(3), "None": None,
    "a model": nn.Linear(2, 2), "code": Bomb(), "code inside": {"module_state_dict": Bomb()},
}  # fmt: skip


def changed(content: Content, change: Change) -> Content:
    content = copy.deepcopy(content)
    change(content)
    return content


def without_checksum(content: Content) -> Content:
    """As a version wrote it that knew no checksum."""
    content = copy.deepcopy(content)
    if isinstance(content.get("dpfix"), dict):
        content["dpfix"].pop("checksum", None)
    return content


def as_opacus(content: Content) -> Content:
    return {key: value for key, value in content.items() if key != "dpfix"}


def hostile(original: bytes, content: Content, file: Path) -> Iterator[tuple[str, bool]]:
    """Writes one hostile file after another; says which, and whether it has to be refused."""
    draw = random.Random(4)
    for number in range(90):
        broken = bytearray(original)
        for _ in range(1 + number % 3):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
        yield f"bit flip {number}", False
    for number in range(20):
        file.write_bytes(original[: draw.randrange(len(original))])
        yield f"cut short {number}", True
    for name, other in OTHERS.items():
        torch.save(other, file)
        yield name, True
        file.write_bytes(pickle.dumps(other))
        yield f"{name}, pickled", True
    for name, change in (NOT_LEGAL | ADDED_NOT_LEGAL).items():
        torch.save(changed(content, change), file)
        yield name, True
        torch.save(without_checksum(changed(content, change)), file)
        yield f"{name}, without a checksum", True
    for name, change in NOT_LEGAL.items():
        torch.save(as_opacus(changed(content, change)), file)
        yield f"{name}, as Opacus saves it", True
    torch.save(changed(content, _weights(weights_of(content)["0.weight"] + 1e-3)), file)
    yield "other weights under the same checksum", True
    torch.save(changed(content, _history(9.0, 0.3, 1)), file)
    yield "another history under the same checksum", True


def load_hostile(folder: Path) -> tuple[int, list[str]]:
    """How many hostile files were loaded or refused, and what went wrong with which."""
    target, file = Target(), folder / "run.pt"
    save(target.training, file, **target.objects())
    saved, original = target.state(), file.read_bytes()
    content = torch.load(file, weights_only=True)
    files, wrong = 0, []
    for name, to_be_refused in hostile(original, content, file):
        files += 1
        target.disturb()
        before = target.state()
        try:
            load(target.training, file, **target.objects())
        except dpfix.DPFixError:
            if not same(before, target.state()):
                wrong.append(f"{name}: refused, and something changed")
        except Exception as error:  # noqa: BLE001 -- none of ours may come
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if to_be_refused or not same(saved, target.state()):
                wrong.append(f"{name}: loaded")
    file.write_bytes(original)
    load(target.training, file, **target.objects())
    if not same(saved, target.state()):
        wrong.append("the file as it was saved: not loaded exactly")
    if os.environ.pop("DPFIX_BOMB", None):
        wrong.append("code in a file was run")
    return files, wrong


@pytest.mark.filterwarnings("ignore:checkpoint. it holds no generators")
def test_a_hostile_file_is_loaded_exactly_or_changes_nothing(tmp_path: Path) -> None:
    files, wrong = load_hostile(tmp_path)
    assert files >= 200 and not wrong, f"{len(wrong)} of {files}:\n" + "\n".join(wrong)


def test_what_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    """A module that refuses its weights while they are loaded, an interrupt, a warning that is an error."""

    class Late(nn.Linear):
        error: type[BaseException] | None = None

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            if self.error is not None:
                raise self.error("late")

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Late(8, 3))
    optimizer = torch.optim.Adam(model.parameters())
    training = dpfix.make_private_safe(**setting(model, optimizer=optimizer))
    file = tmp_path / "run.pt"
    save(training, file)
    epoch(model, training)
    before = [v.clone() for v in model.state_dict().values()]
    for raised, expected in ((ValueError, dpfix.CheckpointError), (KeyboardInterrupt, KeyboardInterrupt)):
        model[2].error = raised  # type: ignore[union-attr]
        with pytest.raises(expected):
            load(training, file)
        assert all(map(torch.equal, model.state_dict().values(), before))
    assert len(training.privacy_engine.accountant.history) == 1


def test_a_checkpoint_of_another_call_of_opacus_keeps_its_masks(tmp_path: Path) -> None:
    """Buffers may be infinite (masks), parameters may not."""

    class Masked(nn.Module):
        mask: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3,), -torch.inf))
            self.last = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x)

    training = dpfix.make_private_safe(**setting(Masked()))
    save(training, tmp_path / "run.pt")
    load(training, tmp_path / "run.pt")
    plain = PrivacyEngine()
    plain.save_checkpoint(path=tmp_path / "opacus.pt", module=training[0], optimizer=training[1])
    with pytest.warns(dpfix.DPFixWarning, match="saved by Opacus"):
        load(training, tmp_path / "opacus.pt")


def test_a_damaged_file_of_weights_is_told(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(nn.Linear(2, 2).state_dict(), file)
    whole = file.read_bytes()
    for broken in (whole[:100], whole[: len(whole) // 2], b"", b"text"):
        file.write_bytes(broken)
        with pytest.raises(dpfix.CheckpointError, match="cannot be read"):
            dpfix.load_pretrained(nn.Linear(2, 2), file)
    assert points()
