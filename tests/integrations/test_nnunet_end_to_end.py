"""nnU-Net itself, from raw images to an ensemble: needs nnunetv2 and takes minutes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

import dpfix
from dpfix.__main__ import main
from dpfix.integrations.nnunet.trainer import KEY
from dpfix.segmentation import ensemble_probabilities, segmentation_from_probabilities
from tests.integrations import nnunet_workflow as workflow
from tests.segmentation.exports import LABELS, ORDER, REGIONS, export

pytestmark = [
    pytest.mark.slow,
    # nnU-Net's own, and matplotlib's about its plots
    pytest.mark.filterwarnings("ignore"),
]

SETTINGS = {
    "DPFIX_NNUNET_NOISE_MULTIPLIER": "0.5",
    "DPFIX_NNUNET_PATIENTS": "2",
    "DPFIX_NNUNET_PATCHES": "2",
    "nnUNet_n_proc_DA": "0",  # only for training: planning fails with it
}


def prepared(folder: Path, **options: Any) -> str:
    labels = options.pop("labels", REGIONS)
    workflow.make_raw(folder, labels)
    with workflow.installed(folder):
        return workflow.prepare(folder, **options)


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("regions")
    plans = prepared(folder)
    with workflow.installed(folder, **SETTINGS):
        yield folder, plans


def one_step(trainer: Any) -> None:
    """The step that a trainer releases without noise, against patients clipped one by one with plain autograd."""
    trainer.num_epochs = trainer.num_iterations_per_epoch = 1
    trainer.on_train_start()
    reference = copy.deepcopy(trainer.network).train()
    for p in reference.parameters():
        p.requires_grad_(True)
        for hooks in (reference, *reference.modules()):
            hooks._forward_hooks.clear()
            hooks._forward_pre_hooks.clear()
    batch = next(trainer.dataloader_train)
    data, target = batch["data"], batch["target"]
    total: dict[str, torch.Tensor] = {}
    for i in range(len(data)):
        reference.zero_grad()
        loss = trainer.loss(reference(data[i]), [t[i] for t in target])
        loss.backward()
        gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, g in gradients.items():
            total[name] = total.get(name, torch.zeros(())) + g * min(1.0, float(1.0 / norm))
    trainer.train_step(batch)
    moved = {n: p.grad for n, p in trainer.network.named_parameters() if n in total}
    size = torch.stack([t.norm() for t in total.values()]).norm()
    error = torch.stack([(moved[n] * len(data) - t).norm() for n, t in total.items()]).norm()
    assert float(error / size) < 1e-3
    trainer.private[0].cleanup()


@pytest.mark.parametrize("planner", ["ExperimentPlanner", "nnUNetPlannerResEncM"])
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("kind", ["regions", "labels", "ignored"])
def test_released_step(tmp_path: Path, kind: str, configuration: str, planner: str) -> None:
    """Plain and residual encoders, with batch Dice (2d) and without, regions, labels, and labels to be ignored."""
    labels = {"regions": REGIONS, "labels": LABELS, "ignored": {"background": 0, "a": 1, "b": 2, "ignore": 3}}[kind]
    plans = prepared(tmp_path, labels=labels, configuration=configuration, planner=planner)
    everybody = SETTINGS | {"DPFIX_NNUNET_NOISE_MULTIPLIER": "0", "DPFIX_NNUNET_PATIENTS": "4"}
    with workflow.installed(tmp_path, **everybody):
        one_step(workflow.trainer(0, plans, configuration=configuration))


def test_train_predict_ensemble(regions: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folds privately, the stock predictor, and an ensemble that is nnU-Net's own."""
    folder, plans = regions
    raw = folder / "raw" / workflow.NAME
    members = []
    for fold in range(2):
        monkeypatch.setenv("nnUNet_n_proc_DA", str(fold))  # without and with worker processes
        made = workflow.train(workflow.trainer(fold, plans), epochs=2, steps=3)
        output = Path(made.output_folder)
        statement = json.loads((output / "privacy_statement.json").read_text())
        assert statement["steps"] == 6 and statement["samples"] == 4 and "patient" in statement["unit"]
        assert statement["epsilon"] == pytest.approx(made.statement().epsilon)
        assert any("fingerprint" in line for line in statement["not_covered"])
        log = next(output.glob("training_log*.txt")).read_text()
        assert "epsilon" in log and "Not covered" in log and (output / "progress.png").is_file()
        checkpoint = torch.load(output / "checkpoint_final.pth", weights_only=False)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        stock = {"network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch"}
        assert stock | {"init_args", "inference_allowed_mirroring_axes", "trainer_name", KEY} == checkpoint.keys()
        members.append(workflow.predict(output.parent, fold, tmp_path / f"fold_{fold}", raw))
    ours = tmp_path / "ours"
    assert main(["segment", "ensemble", *map(str, members), "-o", str(ours)]) == 0
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    ensemble_folders(list(map(str, members)), str(tmp_path / "theirs"), num_processes=1)
    for case in ("c8.nii.gz", "c9.nii.gz"):
        a, b = (NibabelIO().read_seg(str(part / case))[0] for part in (ours, tmp_path / "theirs"))
        assert a.shape == b.shape and (a == b).all()


def test_continued_training_goes_on_counting(regions: tuple[Path, str]) -> None:
    plans = regions[1]
    made = workflow.trainer(1, plans)
    made.save_every = 1
    first = workflow.train(made, epochs=3, steps=2)
    spent = first.statement()
    latest = Path(first.output_folder) / "checkpoint_latest.pth"
    final = Path(first.output_folder) / "checkpoint_final.pth"
    final.rename(latest)
    checkpoint = torch.load(latest, weights_only=False)
    checkpoint["current_epoch"] = 2  # stopped after two of three epochs
    torch.save(checkpoint, latest)
    again = workflow.train(workflow.trainer(1, plans, resume=True), epochs=3, steps=2, resume=True)
    assert again.statement().steps == spent.steps + 2
    assert again.statement().epsilon > spent.epsilon
    assert len(again._epsilons) == 4


def test_checkpoint_without_accountant_is_refused(regions: tuple[Path, str], tmp_path: Path) -> None:
    plans = regions[1]
    stock = workflow.trainer(0, plans, "nnUNetTrainer")
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    with pytest.raises(dpfix.ArgumentError, match="not made by private training"):
        workflow.trainer(0, plans).load_checkpoint(str(tmp_path / "checkpoint.pth"))


def test_a_training_without_budget_is_refused(regions: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFIX_NNUNET_NOISE_MULTIPLIER")
    with pytest.raises(dpfix.ArgumentError, match="exactly one"):
        workflow.trainer(0, regions[1]).run_training()


@pytest.mark.parametrize("attribute", ["is_ddp", "is_cascaded"])
def test_refused_by_name(regions: tuple[Path, str], attribute: str) -> None:
    trainer = workflow.trainer(0, regions[1])
    setattr(trainer, attribute, True)
    with pytest.raises(dpfix.ArgumentError, match=r"DistributedDataParallel|cascade"):
        trainer.initialize()


@pytest.mark.parametrize("kind", ["regions", "labels"])
def test_ensemble_is_nnunets_own(kind: str, tmp_path: Path) -> None:
    """The installed nnunetv2 on exports of three models, voxel by voxel."""
    from nnunetv2.ensembling.ensemble import average_probabilities
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    files = [export(tmp_path / f"m{m}", m, kind, cases=1) / "case_0.npz" for m in range(3)]
    manager = LabelManager(REGIONS, ORDER) if kind == "regions" else LabelManager(LABELS, None)
    theirs = average_probabilities(list(map(str, files)))
    ours = ensemble_probabilities(files, kind=kind)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(
        segmentation_from_probabilities(ours, regions_class_order=ORDER if kind == "regions" else None),
        manager.convert_probabilities_to_segmentation(theirs),
    )
