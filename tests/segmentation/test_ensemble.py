"""Probabilities are averaged once; what is none, or does not fit, is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import dpfix
from dpfix.__main__ import main
from dpfix.segmentation import check_probabilities, ensemble_probabilities, segmentation_from_probabilities
from dpfix.segmentation.folders import ensemble_folders
from tests.segmentation.exports import (
    LABELS,
    ORDER,
    REGIONS,
    SHAPE,
    activated,
    export,
    probabilities,
    properties,
    truth,
)

RECORDED = Path(__file__).parent / "nnunetv2.npz"
"""Exports, and what nnunetv2 2.8.1 and 2.6.4 make of them: written by ``benchmarks/nnunet_ensembling.py``."""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [export(tmp_path / f"model_{model}", model) for model in range(3)]


def members(kind: str = "regions", number: int = 3) -> list[np.ndarray]:
    return [probabilities(truth(), model, kind) for model in range(number)]


# ------------------------------------------------------------------ the same as nnU-Net


def test_voxel_identical_to_nnunet() -> None:
    recorded = np.load(RECORDED)
    for kind, order in (("regions", ORDER), ("labels", None)):
        given = list(recorded[f"{kind}_members"])
        mean = ensemble_probabilities(given, kind=kind)
        assert mean.dtype == np.float32
        np.testing.assert_array_equal(mean, recorded[f"{kind}_mean_2.8.1"])
        segmentation = segmentation_from_probabilities(mean, regions_class_order=order)
        np.testing.assert_array_equal(segmentation, recorded[f"{kind}_segmentation_2.8.1"])


def test_older_nnunet_was_wrong_about_regions() -> None:
    """What 2.6.4 made of the same exports: every voxel inside the crop gets the last region's label."""
    recorded = np.load(RECORDED)
    inside = recorded["regions_mean_2.6.4"][-1] > 1e-7
    assert inside.mean() > 0.3 and set(recorded["regions_segmentation_2.6.4"][inside]) == {ORDER[-1]}
    np.testing.assert_array_equal(recorded["labels_segmentation_2.6.4"], recorded["labels_segmentation_2.8.1"])


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("kind", ["regions", "labels"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_probabilities_are_accepted(kind: str, dtype: Any) -> None:
    for member in members(kind, 8):
        check_probabilities(member.astype(dtype), kind=kind)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("classes", [2, 3, 4, 20])
def test_a_second_softmax_is_refused(classes: int, scale: float, dtype: Any) -> None:
    values = np.random.default_rng(0).normal(0, 3 * scale, (classes, 8, 8, 8))
    once = activated(values, "labels")
    check_probabilities(once.astype(dtype), kind="labels")
    with pytest.raises(dpfix.SegmentationError, match=r"member 3 .*twice.*softmax"):
        check_probabilities(activated(once, "labels").astype(dtype), kind="labels", name="member 3")


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_an_undecided_model_is_no_second_softmax(classes: int, spread: float) -> None:
    """Trained with much noise, its probabilities stay close to 1 / classes."""
    values = np.random.default_rng(1).normal(0, spread / classes, (classes, 8, 8, 8))
    check_probabilities(activated(values, "labels"), kind="labels")


def test_a_second_sigmoid_is_refused() -> None:
    once = members()[0]
    twice = activated(once, "regions")
    padded = np.where(once == 0, 0, twice)  # exported, and padded afterwards
    for wrong in (twice, padded, twice.astype(np.float16)):
        with pytest.raises(dpfix.SegmentationError, match=r"member 1 .*twice.*\[0\.5, 0\.7311\]"):
            ensemble_probabilities([once, wrong])
    with pytest.raises(dpfix.SegmentationError, match="twice"):
        segmentation_from_probabilities(twice, regions_class_order=ORDER)


def test_a_case_without_any_region_is_fine() -> None:
    nothing = np.zeros((3, *SHAPE), np.float32)
    assert not segmentation_from_probabilities(nothing, regions_class_order=ORDER).any()


REFUSED: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "logits": (lambda p: p * 9 - 4, r"member 1 .*logits.*sigmoid once"),
    "slightly above one": (lambda p: p * 1.01, r"member 1 .*outside \[0, 1\]"),
    "not finite": (lambda p: np.where(p > 0.9, np.nan, p), "member 1 .*not finite"),
    "a label map": (lambda p: (p > 0.5).astype(np.uint8), "member 1 .*not a label map"),
    "softmax": (lambda p: p / p.sum(0) if p.sum(0).min() > 0 else activated(p * 9, "labels"), "kind='labels'"),
    "another shape": (lambda p: p[:, :-1], r"member 1 has shape .*same grid"),
    "other classes": (lambda p: p[:2], "member 1 has 2 classes, member 0 has 3"),
    "a number": (lambda p: 0.5, "member 1 is a float"),
    "no file": (lambda p: "nowhere.npz", r"member 1 \(nowhere.npz\) is no"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    change, message = REFUSED[what]
    first, second, third = members()
    with pytest.raises(dpfix.DPFixError, match=message):
        ensemble_probabilities([first, change(second), third])


def test_regions_are_no_labels() -> None:
    with pytest.raises(dpfix.SegmentationError, match=r"member 0 was taken for labels.*kind='regions'"):
        ensemble_probabilities(members(), kind="labels")


@pytest.mark.parametrize("weights", [[1.0], [1, -1, 1], [0, 0, 0], [1, 1, float("nan")]])
def test_weights_are_checked(weights: list[float]) -> None:
    with pytest.raises(dpfix.ArgumentError, match="weights="):
        ensemble_probabilities(members(), weights=weights)


def test_arguments_are_checked() -> None:
    with pytest.raises(dpfix.ArgumentError, match="kind='region'"):
        ensemble_probabilities(members(), kind="region")
    with pytest.raises(dpfix.ArgumentError, match="empty"):
        ensemble_probabilities([])
    with pytest.raises(dpfix.SegmentationError, match="names 2 labels for the 3 regions"):
        segmentation_from_probabilities(members()[0], regions_class_order=[1, 2])


# ------------------------------------------------------------------ what goes in, what comes out


def test_members_are_left_alone() -> None:
    given = members()
    before = [m.copy() for m in given]
    ensemble_probabilities(given)
    assert all((a == b).all() for a, b in zip(given, before, strict=True))


def test_tensors_give_a_tensor() -> None:
    given = members()
    mean = ensemble_probabilities([torch.from_numpy(m).requires_grad_() for m in given])
    assert isinstance(mean, torch.Tensor)
    np.testing.assert_array_equal(mean.numpy(), ensemble_probabilities(given))
    segmentation = segmentation_from_probabilities(mean, regions_class_order=ORDER)
    assert isinstance(segmentation, torch.Tensor)
    expected = segmentation_from_probabilities(mean.numpy(), regions_class_order=ORDER)
    np.testing.assert_array_equal(segmentation.numpy(), expected)


def test_weights() -> None:
    a, b, c = members()
    np.testing.assert_allclose(
        ensemble_probabilities([a, b, c], weights=[2, 1, 1]), ensemble_probabilities([a, a, b, c]), atol=1e-6
    )


def test_monai_tensors_with_another_affine() -> None:
    monai = pytest.importorskip("monai.data")
    a, b, _ = (torch.from_numpy(m) for m in members())
    with pytest.raises(dpfix.SegmentationError, match="member 1 has affine"):
        ensemble_probabilities([monai.MetaTensor(a), monai.MetaTensor(b, affine=torch.diag(torch.tensor([2.0] * 4)))])


def test_files_of_one_case(folders: list[Path]) -> None:
    paths = [folder / "case_0.npz" for folder in folders]
    np.testing.assert_array_equal(
        ensemble_probabilities(paths), ensemble_probabilities([np.load(p)["probabilities"] for p in paths])
    )


def test_spacing_has_to_agree(folders: list[Path]) -> None:
    (folders[1] / "case_0.pkl").write_bytes(pickle.dumps(properties((2.0, 1.0, 1.6))))
    with pytest.raises(dpfix.SegmentationError, match=r"model_1.case_0.npz\) has (spacing|affine).*same voxels"):
        ensemble_probabilities([folder / "case_0.npz" for folder in folders])


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made_by_a_pickle",)


def test_properties_run_no_code(folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (folders[1] / "case_0.pkl").write_bytes(pickle.dumps({"spacing": Hostile()}))
    with pytest.raises(dpfix.SegmentationError, match=r"model_1.case_0.npz\) cannot be read.*mkdir"):
        ensemble_probabilities([folder / "case_0.npz" for folder in folders])
    assert not (tmp_path / "made_by_a_pickle").exists()


# ------------------------------------------------------------------ folders


def test_folders_are_read_case_by_case(folders: list[Path]) -> None:
    cases = ensemble_probabilities(folders)
    assert list(cases) == ["case_0", "case_1"] and len(cases) == 2
    for case, mean in cases.items():
        np.testing.assert_array_equal(mean, ensemble_probabilities([f / f"{case}.npz" for f in folders]))
    with pytest.raises(KeyError):
        cases["case_2"]


def test_a_missing_case_is_named(folders: list[Path]) -> None:
    (folders[2] / "case_1.npz").unlink()
    with pytest.raises(dpfix.SegmentationError, match="model_2 has no case 'case_1'"):
        ensemble_probabilities(folders)


def test_command_line(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["segment", "ensemble", *map(str, folders), "-o", str(out), "--save-probabilities"]) == 0
    assert "2 case(s) from 3 model(s)" in capsys.readouterr().out
    for case in ("case_0", "case_1"):
        mean = ensemble_probabilities([f / f"{case}.npz" for f in folders])
        image = nibabel.load(out / f"{case}.nii.gz")
        written = np.asarray(image.dataobj).transpose(2, 1, 0)
        np.testing.assert_array_equal(written, segmentation_from_probabilities(mean, regions_class_order=ORDER))
        np.testing.assert_allclose(image.affine, properties()["nibabel_stuff"]["original_affine"])
        np.testing.assert_array_equal(np.load(out / f"{case}.npz")["probabilities"], mean)
    assert (out / "dataset.json").read_text() == (folders[0] / "dataset.json").read_text()
    again = tmp_path / "again"  # what was written can be ensembled further
    assert main(["segment", "ensemble", str(out), str(folders[0]), "-o", str(again)]) == 0


def test_command_line_with_labels(tmp_path: Path) -> None:
    given = [export(tmp_path / f"m{model}", model, "labels", cases=1) for model in range(2)]
    assert main(["segment", "ensemble", *map(str, given), "-o", str(tmp_path / "out")]) == 0
    written = np.asarray(nibabel.load(tmp_path / "out/case_0.nii.gz").dataobj).transpose(2, 1, 0)
    assert set(np.unique(written)) == set(LABELS.values())


def test_command_line_refuses(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = activated(probabilities(truth(), 0), "regions")
    np.savez_compressed(folders[1] / "case_0.npz", probabilities=wrong)
    assert main(["segment", "ensemble", *map(str, folders), "-o", str(tmp_path / "out")]) == 2
    assert "model_1" in (said := capsys.readouterr().err) and "twice" in said
    assert main(["segment", "ensemble", "nowhere", "-o", str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_other_labels_are_refused(folders: list[Path], tmp_path: Path) -> None:
    text = (folders[1] / "dataset.json").read_text()
    (folders[1] / "dataset.json").write_text(
        text.replace('"regions_class_order": [1, 2, 3]', '"regions_class_order": [3, 2, 1]')
    )
    with pytest.raises(dpfix.SegmentationError, match="model_1 has regions_class_order"):
        ensemble_folders(folders, tmp_path / "out")


def test_a_missing_order_is_said_so(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in folders:
        (folder / "dataset.json").write_text(json.dumps({"labels": REGIONS, "file_ending": ".nii.gz"}))
    command = ["segment", "ensemble", *map(str, folders), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "region 'whole' = [1, 2, 3], and no regions_class_order" in said
    assert '"regions_class_order": [1, 2, 3]' in said and "--regions-class-order" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--regions-class-order", "1", "2", "3"]) == 0
    for folder in folders:
        (folder / "dataset.json").unlink()
    with pytest.raises(dpfix.ArgumentError, match=r"regions_class_order is not known.*model_0 has no dataset.json"):
        ensemble_folders(folders, tmp_path / "out", kind="regions")


def test_regions_without_an_order_are_no_labels() -> None:
    with pytest.raises(dpfix.SegmentationError, match=r"sum up to .*regions_class_order=, the label of every region"):
        segmentation_from_probabilities(members()[0])


def test_folders_without_properties(folders: list[Path], tmp_path: Path) -> None:
    """Members saved by a script of one's own: the label map is written as an array."""
    for folder in folders:
        for file in (*folder.glob("*.pkl"), folder / "dataset.json"):
            file.unlink()
    with pytest.raises(dpfix.ArgumentError, match="kind is not known"):
        ensemble_folders(folders, tmp_path / "out")
    first, _ = ensemble_folders(folders, tmp_path / "out", regions_class_order=ORDER)
    mean = ensemble_probabilities([f / "case_0.npz" for f in folders])
    np.testing.assert_array_equal(
        np.load(first)["segmentation"], segmentation_from_probabilities(mean, regions_class_order=ORDER)
    )
