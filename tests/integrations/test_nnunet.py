"""Private training with nnU-Net, the parts that do not need nnunetv2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.__main__ import main
from dpfix.integrations.nnunet import PatientPatches, Settings, diagnose_installation, mean_over_patients
from dpfix.integrations.nnunet.doctor import TRAINERS
from dpfix.integrations.nnunet.patients import stock_loader
from dpfix.integrations.nnunet.plot import append_epsilon
from dpfix.integrations.nnunet.settings import read_settings
from dpfix.integrations.nnunet.trainer import PrivateTrainer
from tests.helpers import setting
from tests.reference import clipped_sum, gradients_one_by_one

CASES = ("a_1", "a_2", "b_1", "c_1", "c_2", "c_3")


class Loader:
    """Draws like nnU-Net's loader: cases with replacement, a random patch of each."""

    batch_size, oversample_foreground_percent = 2, 0.33

    def __init__(self) -> None:
        self.indices = list(CASES)
        self.get_do_oversample: Callable[[int], bool] = lambda j: j >= self.batch_size - 1

    def get_indices(self) -> list[str]:
        return list(np.random.choice(self.indices, self.batch_size))

    def _probabilistic_oversampling(self, j: int) -> bool:
        return bool(np.random.uniform() < self.oversample_foreground_percent)

    def generate_train_batch(self) -> dict[str, Any]:
        keys = self.get_indices()
        assert len(keys) == self.batch_size
        of_case = torch.tensor([float(CASES.index(key)) for key in keys])
        data = torch.randn(len(keys), 1, 8, 8) + of_case.view(-1, 1, 1, 1)
        full = data > of_case.view(-1, 1, 1, 1)
        return {"data": data, "target": [full, full[..., ::2, ::2]], "keys": keys}


class Net(nn.Module):
    """Deep supervision, in-place activations, a residual, a head that the loss gives no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(inplace=True)
        )
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        out = self.block(x)
        out += x
        return [self.heads[0](out), self.heads[1](nn.functional.avg_pool2d(out, 2))]


def batch_dice(output: list[Tensor], target: list[Tensor]) -> Tensor:
    """A loss over its whole batch, full resolution only."""
    p, y = output[0].sigmoid(), target[0].to(output[0])
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum() + 1)


def step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return mean_over_patients(batch_dice, model(batch["data"].flatten(0, 1)), batch["target"])


# ------------------------------------------------------------------ patients


def test_an_item_is_patches_of_one_case() -> None:
    data = PatientPatches(Loader(), patches=3)
    assert len(data) == len(CASES)
    for index in range(len(data)):
        item = data[index]
        assert item["data"].shape == (3, 1, 8, 8) and item["target"][1].shape == (3, 1, 4, 4)
        means = item["data"].flatten(1).mean(1)
        assert bool(((means - index).abs() < 0.5).all())
        assert not torch.equal(item["data"][0], item["data"][1])


def test_cases_of_a_patient_are_one_sample() -> None:
    data = PatientPatches(Loader(), 8, Settings(patient_pattern="^(.)_").patient_of)
    assert data.patients == ["a", "b", "c"] and len(data) == 3
    seen = {round(float(m)) for _ in range(8) for m in data[2]["data"].flatten(1).mean(1)}
    assert seen == {3, 4, 5}


def test_one_patch_keeps_the_share_of_foreground() -> None:
    loader = Loader()
    PatientPatches(loader, patches=1)
    drawn = [loader.get_do_oversample(0) for _ in range(400)]
    assert 0.2 < np.mean(drawn) < 0.45


def test_another_loader_is_refused() -> None:
    class Augmenter:
        data_loader = object()

    with pytest.raises(dpfix.LoaderError, match="Augmenter around object"):
        stock_loader(Augmenter())


# ------------------------------------------------------------------ the step that is released


def private(data: Any, clip_norm: float, **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    torch.manual_seed(5)
    model = Net()
    arguments: dict[str, Any] = {
        "data_loader": DataLoader(data, batch_size=len(data)),
        "training_step": step,
        "noise_multiplier": 0.0,
        "poisson_sampling": False,
    }
    training = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        max_grad_norm=clip_norm,
        wrap_model=False,
        **(arguments | changes),
    )
    return model, training


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def released(model: nn.Module, optimizer: Any, batch: dict[str, Any], patients: int) -> Tensor:
    """The clipped sum of one step."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer.zero_grad()
    step(model, batch).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (before - after) * patients


def clipped(model: nn.Module, batch: dict[str, Any], clip_norm: float) -> Tensor:
    """Patient after patient, by plain autograd."""
    patients = [
        {"data": batch["data"][i : i + 1], "target": [t[i : i + 1] for t in batch["target"]]}
        for i in range(len(batch["data"]))
    ]
    total = clipped_sum(gradients_one_by_one(model, step, patients), clip_norm)
    return torch.cat([g.flatten() for g in total.values()]).float()


@pytest.mark.parametrize("patches", [1, 3])
@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_patches_are_averaged_before_clipping(patches: int, clip_norm: float) -> None:
    data = PatientPatches(Loader(), patches)
    model, (_, optimizer, loader) = private(data, clip_norm)
    batch = next(iter(loader))
    torch.manual_seed(5)
    expected = clipped(Net(), batch, clip_norm)
    torch.testing.assert_close(released(model, optimizer, batch, len(data)), expected, rtol=1e-4, atol=1e-6)


def test_one_patient_moves_the_sum_by_at_most_the_clip_norm() -> None:
    """Also one whose 8 patches would each be clipped on their own: without averaging that were 8 times as much."""
    clip_norm, data = 0.01, PatientPatches(Loader(), 8)
    batch = next(iter(DataLoader(data, batch_size=len(data))))
    model, (_, optimizer, _) = private(data, clip_norm)
    everybody = released(model, optimizer, batch, len(data))
    fewer = {"data": batch["data"][1:], "target": [t[1:] for t in batch["target"]]}
    model, (_, optimizer, _) = private(data, clip_norm)
    assert float((everybody - released(model, optimizer, fewer, len(data))).norm()) <= clip_norm * (1 + 1e-4)


def test_an_empty_draw_adds_noise_and_is_counted() -> None:
    data = PatientPatches(Loader(), 2)
    loader = DataLoader(data, batch_size=1)
    model, training = private(data, 1.0, data_loader=loader, noise_multiplier=1.0, poisson_sampling=True)
    _, optimizer, private_loader = training
    empty = steps = 0
    while not empty:
        for batch in private_loader:
            drawn = private_loader.ledger.pending()
            moved = released(model, optimizer, batch, 1)
            steps += 1
            if drawn == 0:
                empty += 1
                assert 0.1 < float(moved.std()) < 3
    assert training.statement(1e-2).steps == steps


def mean_of_labelled(output: list[Tensor], target: list[Tensor]) -> Tensor:
    """As nnU-Net with an ignore label: the mean over all voxels of its batch that are labelled, 0 if there is none."""
    truth, ignored = target[0][:, :1].to(output[0]), target[0][:, 1:]
    each = nn.functional.binary_cross_entropy_with_logits(output[0], truth, reduction="none")
    return (each * ~ignored).sum() / (~ignored).sum().clip(min=1e-8)


def unlabelled_batch(patients: int, patches: int = 2) -> dict[str, Any]:
    """Patients of whom everything, nothing, a part of one patch, ... is labelled."""
    torch.manual_seed(3)
    data, ignored = torch.randn(patients, patches, 1, 8, 8), torch.zeros(patients, patches, 1, 8, 8, dtype=torch.bool)
    ignored[1], ignored[2, 0], ignored[3, :, :, 1:] = True, True, True
    return {"data": data, "target": [torch.cat([data > 0, ignored], 2), torch.zeros(patients, patches, 1, 4, 4)]}


def test_ignored_voxels_of_a_patient_are_nobody_elses() -> None:
    """The sum that is released is that of the patients' gradients, each over the labelled voxels of her own."""

    def of_labelled(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return mean_over_patients(mean_of_labelled, model(batch["data"].flatten(0, 1)), batch["target"])

    batch = unlabelled_batch(4)
    data = [{"data": batch["data"][i], "target": [t[i] for t in batch["target"]]} for i in range(4)]
    model, (_, optimizer, loader) = private(data, 0.01, training_step=of_labelled)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for drawn in loader:
        optimizer.zero_grad()
        of_labelled(model, drawn).backward()
        optimizer.step()
    moved = (before - torch.cat([p.detach().flatten() for p in model.parameters()])) * 4
    torch.manual_seed(5)
    alone = [{"data": batch["data"][i : i + 1], "target": [t[i : i + 1] for t in batch["target"]]} for i in range(4)]
    total = clipped_sum(gradients_one_by_one(Net(), of_labelled, alone), 0.01)
    expected = torch.cat([g.flatten() for g in total.values()]).float()
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_batch_dice_over_patients_would_be_refused() -> None:
    data = PatientPatches(Loader(), 2)

    def coupled(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return batch_dice(model(batch["data"].flatten(0, 1)), [t.flatten(0, 1) for t in batch["target"]])

    with pytest.raises(dpfix.CoupledLossError, match="DPF014"):
        model = Net()
        dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=3),
            training_step=coupled,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


# ------------------------------------------------------------------ settings


def test_environment_wins_over_plans() -> None:
    settings = read_settings(
        {"DPFIX_NNUNET_PATCHES": "4", "PATH": "/bin"},
        {"dpfix": {"target_epsilon": 8, "patches": 3}},
        {"dpfix": {"max_grad_norm": 0.5}},
    )
    assert settings == Settings(target_epsilon=8.0, patches=4, max_grad_norm=0.5)
    settings.check_budget()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PATCHES", "0", "patches='0' is no positive whole number"),
        ("PATCHES", "1.5", "no positive whole number"),
        ("TARGET_EPSILON", "-1", "no positive number"),
        ("TARGET_EPSILON", "inf", "no positive number"),
        ("DELTA", "nan", "no positive number"),
        ("ACCOUNTANT", "gdp", "neither 'prv' nor 'rdp'"),
        ("TARGET_EPSILN", "8", "Did you mean 'target_epsilon'"),
    ],
)
def test_settings_are_checked(name: str, value: str, message: str) -> None:
    with pytest.raises(dpfix.DPFixError, match=message):
        read_settings({f"DPFIX_NNUNET_{name}": value})


@pytest.mark.parametrize("given", [{}, {"target_epsilon": 8.0, "noise_multiplier": 1.0}])
def test_a_budget_is_needed_one_way(given: dict[str, float]) -> None:
    with pytest.raises(dpfix.ArgumentError, match="exactly one"):
        Settings(**given).check_budget()  # type: ignore[arg-type]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(dpfix.ArgumentError, match="finds no patient in the case 'c7'"):
        Settings(patient_pattern="^(.*)_visit").patient_of("c7")


# ------------------------------------------------------------------ a budget that folds share


class Fold(PrivateTrainer):
    """The part of a trainer that begins to train, with a network and patients and without nnU-Net."""

    was_initialized, num_epochs, num_iterations_per_epoch, current_epoch = True, 2, 5, 0

    class Begin:
        def on_train_start(self) -> None:
            pass

    def __init__(self, **given: Any) -> None:
        torch.manual_seed(5)
        self.settings, self.device, self.loss = Settings(**given), torch.device("cpu"), batch_dice
        self.network = Net()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.dataloader_train = DataLoader(PatientPatches(Loader(), 2), 3)

    def print_to_log_file(self, text: str) -> None:
        pass


class BudgetedFold(Fold, Fold.Begin):
    pass


def test_folds_share_a_budget(tmp_path: Path) -> None:
    file = tmp_path / "data.budget.json"
    budget = dpfix.Budget(file, epsilon=12.0, delta=1e-2)
    fold = BudgetedFold(noise_multiplier=2.0, budget=str(file))
    fold.on_train_start()
    for _ in range(5):
        fold.train_step(next(fold.dataloader_train))
    (line,) = json.loads(file.read_text())["trainings"].values()
    assert sum(row["steps"] for row in [*line["released"], line["ahead"]]) >= 5
    assert fold.statement().budget
    fold.dataloader_train.close()
    fold.private[0].cleanup()  # type: ignore[index]
    (line,) = json.loads(file.read_text())["trainings"].values()
    assert [row["steps"] for row in line["released"]] == [5] and budget.spent() > 0

    other = BudgetedFold(noise_multiplier=0.6, budget=str(file))
    with pytest.raises(dpfix.BudgetError, match="does not allow the 10 steps of this fold that are to come"):
        other.on_train_start()
    assert other.private is None and len(json.loads(file.read_text())["trainings"]) == 1
    other.current_epoch = 1  # continued: fewer steps are to come
    other.on_train_start()
    assert other.private is not None


def test_the_file_of_a_shared_budget_is_named_and_there(tmp_path: Path) -> None:
    settings = read_settings({"DPFIX_NNUNET_BUDGET": str(tmp_path / "none.json"), "DPFIX_NNUNET_NOISE_MULTIPLIER": "1"})
    with pytest.raises(dpfix.ArgumentError, match=r"none.json' is no file.*Every fold"):
        settings.check_budget()
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(dpfix.BudgetError, match="damaged"):
        settings.check_budget()


# ------------------------------------------------------------------ doctor


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    from dpfix.integrations.nnunet import doctor

    return lambda text: monkeypatch.setattr(doctor.metadata, "version", lambda name: text)


def said(**environment: str) -> str:
    return "\n".join(map(str, diagnose_installation(environment)))


def test_doctor_names_the_ensembling_bug(version: Callable[[str], None]) -> None:
    version("2.6.4")
    assert "wrong  nnunetv2 2.6.4" in said() and "2.7.0" in said()
    version("2.8.1")
    assert "2.7.0 or newer" not in said()
    version("2.5.1")
    assert "needs 2.6 or newer" in said()


def test_doctor_reads_the_environment(version: Callable[[str], None]) -> None:
    version("2.8.1")
    text = said(nnUNet_n_proc_DA="0", nnUNet_compile="true", DPFIX_NNUNET_TARGET_EPSILON="many")
    for part in ("nnUNet_extTrainer does not name", "nnUNet_n_proc_DA=0", "nnUNet_compile", "target_epsilon='many'"):
        assert part in text
    left = said(nnUNet_extTrainer=str(TRAINERS), DPFIX_NNUNET_TARGET_EPSILON="8").splitlines()
    assert [line for line in left if "torchvision" not in line] == []


def test_doctor_reads_plans(version: Callable[[str], None], tmp_path: Path) -> None:
    version("2.8.1")
    plans = {
        "configurations": {
            "2d": {"batch_dice": True},
            "3d_fullres": {"batch_dice": False},
            "3d_cascade_fullres": {"previous_stage": "3d_lowres"},
        }
    }
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "ignore": 2}}))
    environment = {"nnUNet_extTrainer": str(TRAINERS), "DPFIX_NNUNET_NOISE_MULTIPLIER": "1"}
    remarks = [str(r) for r in diagnose_installation(environment, tmp_path)]
    wrong = [r for r in remarks if r.startswith("wrong") and "torchvision" not in r]  # nnunetv2 may be here without it
    assert wrong == [r for r in remarks if "3d_cascade_fullres" in r]
    assert any("2d has batch_dice" in r for r in remarks) and any("ignore label" in r for r in remarks)
    assert "nowhere" in str(diagnose_installation(environment, tmp_path, "nowhere")[-1])


@pytest.mark.parametrize(
    ("labels", "order", "said"),
    [
        ({"WT": [1, 2, 3, 4], "TC": [1, 2, 3], "ET": 1}, [4, 2, 1], None),
        ({"a": 1, "b": [2]}, None, None),
        ({"WT": [1, 2], "TC": [2], "ignore": 3}, None, r"no regions_class_order.*\"regions_class_order\": \[1, 2\]"),
        ({"TC": [2], "WT": [1, 2]}, [2, 1], "label 2 comes back as 1"),
    ],
)
def test_doctor_reads_regions(
    tmp_path: Path, labels: dict[str, Any], order: list[int] | None, said: str | None
) -> None:
    (tmp_path / "nnUNetPlans.json").write_text("{}")
    given = {"labels": {"background": 0, **labels}} | ({} if order is None else {"regions_class_order": order})
    (tmp_path / "dataset.json").write_text(json.dumps(given))
    remarks = [r for r in diagnose_installation({}, tmp_path) if "label" in r.text and "ignore label" not in r.text]
    if said is None:
        assert remarks == []
    else:
        assert len(remarks) == 1 and re.search(said, remarks[0].text)
        assert remarks[0].wrong == (order is None)  # nnU-Net stops without one; labels that are lost are worth knowing


def test_doctor_on_the_command_line(
    version: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version("2.6.4")
    assert main(["nnunet", "doctor"]) == 1
    assert "sigmoid" in capsys.readouterr().out
    version("2.8.1")
    monkeypatch.setenv("DPFIX_NNUNET_NOISE_MULTIPLIER", "1")
    assert main(["nnunet", "trainers"]) == 0
    assert capsys.readouterr().out.strip() == str(TRAINERS)
    assert [p.name for p in TRAINERS.glob("*.py")] == ["nnUNetTrainerDP.py"]


def test_epsilon_is_drawn_below_the_progress(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (300, 500)).save(tmp_path / "progress.png")
    append_epsilon(tmp_path / "progress.png", [0.5, 1.0])
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (300, 650)
    append_epsilon(tmp_path / "nowhere.png", [0.5])


# ------------------------------------------------------------------ checkpoints


class Stock:
    """What nnU-Net's trainer does with checkpoints: one that holds plain values and scalars of NumPy, read as any pickle."""

    def __init__(self, extra: Any = None) -> None:
        self.network, self.extra, self.loaded = nn.Linear(2, 2), extra, 0
        self.disable_checkpointing = False

    def save_checkpoint(self, filename: str) -> None:
        content = {
            "network_weights": self.network.state_dict(),
            "_best_ema": np.float64(0.5),
            "logging": {"ema": [np.float32(1.0)], "lrs": np.arange(2.0)},
            "init_args": {"device": torch.device("cpu"), "fold": 0},
            "trainer_name": "nnUNetTrainerDP",
        }
        torch.save(content | ({} if self.extra is None else {"extra": self.extra}), filename)

    def load_checkpoint(self, filename: Any) -> None:
        torch.load(filename, weights_only=False)
        self.loaded += 1


class Ran:
    """Notes that a file has run code."""

    seen: list[int] = []  # noqa: RUF012 - shared on purpose

    def __reduce__(self) -> Any:
        return Ran.seen.append, (1,)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Trainer(PrivateTrainer, Stock):
        def statement(self) -> Any:
            return dpfix.make_private_safe(**setting()).statement(1e-3)

    file = tmp_path / "checkpoint_latest.pth"
    trainer = Trainer()
    trainer.private, trainer._epsilons = dpfix.make_private_safe(**setting()), [0.5]
    trainer.save_checkpoint(str(file))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_latest.pth", "privacy_statement.json"]
    again = Trainer()
    again.load_checkpoint(str(file))
    assert again.loaded == 1 and again._accounted is not None and again._accounted["epsilons"] == [0.5]

    content = torch.load(file, weights_only=False)
    torch.save(content | {"extra": Ran()}, file)
    with pytest.raises(dpfix.CheckpointError, match="would run code"):
        again.load_checkpoint(str(file))
    assert Ran.seen == [] and again.loaded == 1
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(dpfix.CheckpointError, match="cannot be read"):
        again.load_checkpoint(str(file))
    Stock().save_checkpoint(str(file))
    with pytest.raises(dpfix.ArgumentError, match="not made by private training"):
        again.load_checkpoint(str(file))
    assert again.loaded == 1, "refused before anything is loaded"
