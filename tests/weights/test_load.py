"""Every key of a checkpoint is used, renamed, or named in an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpfix


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def ready(seed: int = 0) -> nn.Sequential:
    model = net(seed)
    model(torch.zeros(2, 3, 5, 5))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    there = b.state_dict()
    return all(torch.equal(v, there[k]) for k, v in a.state_dict().items())


WRAPPED = {
    "plain": lambda s: s,
    "data parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "Opacus": lambda s: {f"_module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "all of them": lambda s: {f"_module.module._orig_mod.{k}": v for k, v in s.items()},
    "in a checkpoint": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer": {"state": {}}},
    "of Opacus's engine": lambda s: {"module_state_dict": {f"_module.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_recognised(kind: str) -> None:
    old, model = ready(1), ready(2)
    report = dpfix.load_pretrained(model, WRAPPED[kind](old.state_dict()))
    assert same(model, old) and len(report.loaded) == len(old.state_dict()) and report.source == "as is"


def test_a_module_of_that_name_is_no_prefix() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model, old = Holder(), Holder()
    assert not dpfix.load_pretrained(model, old.state_dict()).stripped
    assert same(model, old)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_are_read(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from dpfix.weights.files import write

    old, model = ready(1), ready(2)
    dpfix.load_pretrained(model, write(old.state_dict(), tmp_path / f"weights.{suffix}"))
    assert same(model, old)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": ready()}, tmp_path / "model.pt")
    with pytest.raises(dpfix.CheckpointError, match="reading it would run code from the file"):
        dpfix.load_pretrained(ready(), tmp_path / "model.pt")
    with pytest.raises(dpfix.ArgumentError, match="is not a file"):
        dpfix.load_pretrained(ready(), tmp_path / "absent.pt")


def test_a_lazy_layer_gets_its_shape_from_the_checkpoint() -> None:
    old, model = ready(1), net(2)
    dpfix.load_pretrained(model, old.state_dict())
    assert same(model, old)


def changed(change: str) -> dict[str, Tensor]:
    state = dict(ready(1).state_dict())
    if change == "missing":
        del state["0.bias"]
    elif change == "unused":
        state["head.weight"] = torch.zeros(1)
    else:
        state["0.weight"] = torch.zeros(4, 3, 1, 1)
    return state


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("missing", "MissingKeysError", r"weights that the checkpoint does not have:\n  0.bias\n"),
        ("unused", "UnusedKeysError", r"1 keys of the checkpoint have no place: head.weight"),
        ("shape", "ShapeMismatchError", r"0.weight: \[4, 3, 1, 1\] in the checkpoint, \[4, 3, 3, 3\] in the model"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(change: str, error: str, text: str) -> None:
    model = ready(2)
    before = copy.deepcopy(model)
    with pytest.raises(getattr(dpfix, error), match=text):
        dpfix.load_pretrained(model, changed(change))
    assert same(model, before)
    with pytest.raises(RuntimeError):  # as load_state_dict raises
        dpfix.load_pretrained(model, changed(change))


def test_without_strict_the_report_lists_what_is_left() -> None:
    model, old = ready(2), ready(1)
    kept = model[0].bias.detach().clone()
    report = dpfix.load_pretrained(model, changed("missing"), strict=False)
    assert report.missing == ("0.bias",) and torch.equal(model[0].bias, kept)
    assert torch.equal(model[0].weight, old[0].weight)
    assert dpfix.load_pretrained(model, changed("unused"), strict=False).unused == ("head.weight",)
    with pytest.raises(dpfix.ShapeMismatchError):
        dpfix.load_pretrained(model, changed("shape"), strict=False)


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        ({"epoch": 3}, "no state dict that dpfix recognises: epoch"),
        ({"model": {"w": torch.zeros(1)}, "net": {"w": torch.zeros(1)}}, "several state dicts: model, net"),
        ({}, "no state dict that dpfix recognises: nothing"),
    ],
)
def test_a_checkpoint_without_one_state_dict_is_refused(checkpoint: dict[str, Any], text: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=text):
        dpfix.load_pretrained(ready(), checkpoint)


def test_the_entry_can_be_named() -> None:
    old, model = ready(1), ready(2)
    dpfix.load_pretrained(model, {"ema": old.state_dict(), "model": ready(3).state_dict()}, entry="ema")
    assert same(model, old)
    with pytest.raises(dpfix.ArgumentError, match=r"entry='emma': .* It has ema"):
        dpfix.load_pretrained(model, {"ema": old.state_dict()}, entry="emma")


def test_weights_of_another_dtype_are_converted_and_ties_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = {k: torch.full_like(v, 0.5).double() for k, v in model.state_dict().items()}
    dpfix.load_pretrained(model, state)
    assert model[0].weight.dtype is torch.float32 and model[1].weight is model[0].weight
    assert bool((model[0].weight == 0.5).all())


def test_a_module_that_changes_its_weights_on_loading_is_named() -> None:
    class Rounded(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].round()
            super()._load_from_state_dict(state, prefix, *rest)

    given = {"weight": torch.full((2, 2), 0.3), "bias": torch.zeros(2)}
    with pytest.raises(dpfix.CheckpointError, match="weight of Rounded does not have the checkpoint's value"):
        dpfix.load_pretrained(Rounded(2, 2), given)
    assert bool((given["weight"] == 0.3).all())
