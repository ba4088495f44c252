"""Checkpoints of monai-generative 0.2.3 in MONAI's networks: same outputs, or refused by name."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

import dpfix
from dpfix.weights import compare_outputs
from tests.weights.legacy_zoo import REFUSED, ZOO, Legacy
from tests.weights.record_legacy import load

MOST = 1e-6
every_network = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
CASES = {case.name: case for case in (*ZOO, *REFUSED)}
AUTOENCODER = CASES["AutoencoderKL 2D"]


def largest(case: Legacy, model: nn.Module, outputs: dict[str, list[Tensor]]) -> float:
    """Largest difference from the recorded outputs of all methods."""
    assert outputs and all(outputs.values())
    return max(compare_outputs(recorded, case.run(model, method)) for method, recorded in outputs.items())


def source(case: Legacy) -> str | None:
    """Networks whose keys have not changed are loaded as they are."""
    return "as is" if case.cls in ("VQVAE", "PatchDiscriminator", "MultiScalePatchDiscriminator", "SPADENet") else None


@every_network
def test_outputs_are_those_that_were_recorded(case: Legacy) -> None:
    weights, outputs = load(case)
    model = case.build_new(nets)
    report = dpfix.load_pretrained(model, weights)
    assert report.source == (source(case) or "monai-generative")
    assert not report.unused and not report.missing
    assert largest(case, model, outputs) <= MOST


@every_network
def test_every_key_is_accounted_for_and_the_given_mapping_kept(case: Legacy) -> None:
    weights, _ = load(case)
    before = {key: value.clone() for key, value in weights.items()}
    model = case.build_new(nets)
    report = dpfix.load_pretrained(model, weights, source="monai-generative")
    made_of = [key for old in report.renamed.values() for key in old]
    assert sorted([*report.loaded, *made_of, *report.dropped]) == sorted(before)
    assert sorted([*report.loaded, *report.renamed, *report.filled]) == sorted(model.state_dict())
    assert list(weights) == list(before)
    assert all(torch.equal(weights[key], value) for key, value in before.items())


@every_network
@pytest.mark.skipif(importlib.util.find_spec("generative") is None, reason="monai-generative is not installed")
@pytest.mark.filterwarnings("ignore")
def test_live_outputs_agree_layer_by_layer(case: Legacy) -> None:
    """The same against the package itself; where the old and the new network have modules of one name, at these too."""
    from generative.networks import nets as old_nets  # pyright: ignore[reportMissingImports]

    old, model = case.build_old(old_nets), case.build_new(nets)
    dpfix.load_pretrained(model, old.state_dict(), source="monai-generative")
    for method in case.calls:
        assert compare_outputs(case.run(old, method), case.run(model, method)) <= MOST
        if case.cls in ("AutoencoderKL", "DiffusionModelUNet"):
            same = {path: path for path, _ in old.named_modules() if path.count(".") <= 2}
            there = dict(model.named_modules())
            report = dpfix.verify_equivalence(
                old,
                model,
                case.inputs(method),
                method=method,
                modes=("eval",),
                mapping={path: path for path in same if path in there},
            )
            assert report and report.first is None, str(report)


# ------------------------------------------------------------------ MONAI's own loader


def loaded_by_monai(case: Legacy, weights: dict[str, Tensor]) -> Any:
    model = case.build_new(nets)
    model.load_old_state_dict(dict(weights))
    return model


@pytest.mark.parametrize(
    ("name", "first"),
    [("AutoencoderKL 2D", "encoder.blocks.4"), ("DiffusionModelUNet 2D", "down_blocks.1.attentions.0")],
)
def test_the_loader_of_monai_is_caught_at_the_first_attention_block(name: str, first: str) -> None:
    case = CASES[name]
    weights, outputs = load(case)
    right, theirs = case.build_new(nets), loaded_by_monai(case, weights)
    dpfix.load_pretrained(right, weights)
    method = next(iter(outputs))
    report = dpfix.verify_equivalence(right, theirs, case.inputs(method), method=method)
    assert not report and report.first is not None
    assert report.first.path.startswith(f"{first}.attn.out_proj")
    assert report.max_difference > 0.01
    assert largest(case, theirs, outputs) > 0.01


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "AutoencoderKL transposed convolution",
            "`decoder.blocks.6` is a transposed convolution with kernel 2 in MONAI",
        ),
        ("SPADENet without VAE", "`decoder` starts with a convolution of the segmentation"),
        ("DiffusionModelUNet conditional without fc", "attn1` has include_fc=False"),
        ("DecoderOnlyTransformer without fc", "`blocks.0.attn` has include_fc=False"),
    ],
)
@pytest.mark.parametrize("given", [None, "monai-generative"])
def test_what_the_new_network_cannot_compute_is_refused(name: str, reason: str, given: str | None) -> None:
    case = CASES[name]
    model = case.build_new(nets)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dpfix.NotConvertibleError, match="cannot compute what the checkpoint's model did") as refusal:
        dpfix.load_pretrained(model, load(case)[0], source=given)
    assert reason in str(refusal.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_activation_in_spade_net_is_refused() -> None:
    case = CASES["SPADENet as VAE"]
    model = case.build_new(nets, act="RELU")
    with pytest.raises(dpfix.NotConvertibleError, match=r"had LeakyReLU\(0.2\) there"):
        dpfix.load_pretrained(model, load(case)[0], source="monai-generative")


def test_a_model_without_such_a_network_is_refused() -> None:
    with pytest.raises(dpfix.NotConvertibleError, match="Linear holds none of the networks"):
        dpfix.load_pretrained(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}, source="monai-generative")


# ------------------------------------------------------------------ the projection


def test_proj_attn_is_used_when_asked_for() -> None:
    weights, outputs = load(AUTOENCODER)
    model, plain = AUTOENCODER.build_new(nets), AUTOENCODER.build_new(nets)
    report = dpfix.load_pretrained(model, weights, legacy_projection="proj_attn")
    assert report.renamed["encoder.blocks.4.attn.out_proj.weight"] == ("encoder.blocks.4.proj_attn.weight",)
    assert not report.dropped
    assert largest(AUTOENCODER, model, outputs) > 0.01
    dpfix.load_pretrained(plain, weights)
    # by hand: the projection behind the attention, in front of the sum
    for block, other in zip(model.modules(), plain.modules(), strict=True):
        if type(block).__name__ == "SABlock":
            other.out_proj = copy.deepcopy(block.out_proj)  # type: ignore[assignment]
    assert dpfix.verify_equivalence(model, plain, AUTOENCODER.inputs("encode"), method="encode")


def test_proj_attn_without_a_layer_for_it_is_refused() -> None:
    case = CASES["AutoencoderKL without fc"]
    with pytest.raises(dpfix.NotConvertibleError, match=r"there is no layer for encoder.blocks.4.proj_attn.weight"):
        dpfix.load_pretrained(case.build_new(nets), load(case)[0], legacy_projection="proj_attn")


def test_unknown_values_are_named() -> None:
    with pytest.raises(dpfix.ArgumentError, match="legacy_projection='proj' is none of 'identity', 'proj_attn'"):
        dpfix.load_pretrained(nn.Linear(1, 1), {}, legacy_projection="proj")
    with pytest.raises(dpfix.ArgumentError, match="source='generative' is none of 'as is', 'monai-generative'"):
        dpfix.load_pretrained(nn.Linear(1, 1), {}, source="generative")


def test_the_epsilon_that_the_weights_do_not_hold_is_set_and_reported() -> None:
    case = CASES["SPADEAutoencoderKL 2D"]
    model = case.build_new(nets)
    report = dpfix.load_pretrained(model, load(case)[0])
    assert len(report.adjusted) == 8
    assert "norm1.param_free_norm.eps = 1e-05 (was 1e-06)" in report.adjusted[0]
    assert "set decoder." in str(report)


def test_a_network_inside_another_model_is_converted_too() -> None:
    weights, outputs = load(AUTOENCODER)

    class Pipeline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.head = AUTOENCODER.build_new(nets), nn.Linear(2, 2).double()

    model = Pipeline()
    head = {f"head.{k}": v for k, v in model.head.state_dict().items()}
    dpfix.load_pretrained(model, {f"vae.{k}": v for k, v in weights.items()} | head)
    assert largest(AUTOENCODER, model.vae, outputs) <= MOST


def test_prefixes_of_wrappers_are_taken_off() -> None:
    weights, outputs = load(AUTOENCODER)
    model = AUTOENCODER.build_new(nets)
    report = dpfix.load_pretrained(model, {"state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}})
    assert report.stripped == ("_orig_mod.", "module.")
    assert largest(AUTOENCODER, model, outputs) <= MOST


# ------------------------------------------------------------------ recorded outputs


def recordings(case: Legacy) -> list[dict[str, Any]]:
    found = []
    for method, recorded in load(case)[1].items():
        given = {"inputs": case.inputs(method), "output": tuple(recorded), "method": method, "seed": 20}
        found.append(given if len(recorded) > 1 else given | {"output": recorded[0]})
    return found


def test_recorded_outputs_are_reproduced_and_the_model_stays(tmp_path: Path) -> None:
    weights, _ = load(AUTOENCODER)
    model = AUTOENCODER.build_new(nets)
    before = copy.deepcopy(model.state_dict())
    torch.save(recordings(AUTOENCODER), tmp_path / "recorded.pt")
    report = dpfix.verify_legacy(model, weights, tmp_path / "recorded.pt")
    assert report and len(report.differences) == 3 and max(report.differences) <= MOST
    assert "reproduces 3 recorded outputs" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_other_projection_is_tried_and_named() -> None:
    weights, _ = load(AUTOENCODER)
    report = dpfix.verify_legacy(
        AUTOENCODER.build_new(nets), weights, recordings(AUTOENCODER), legacy_projection="proj_attn"
    )
    assert not report and report.other_projection is not None and report.other_projection <= MOST
    assert "with legacy_projection='identity'" in str(report)


def test_a_transposed_convolution_that_its_weights_do_not_show_is_found() -> None:
    """Loaded into a model without it, every key and shape fits; only outputs tell."""
    case = CASES["AutoencoderKL transposed convolution"]
    weights, outputs = load(case)
    model = AUTOENCODER.build_new(nets)
    assert any("use_convtranspose=False" in text for text in dpfix.load_pretrained(model, weights).assumed)
    one = dpfix.Recording(case.inputs("encode"), tuple(outputs["encode"]), "encode")
    assert dpfix.verify_legacy(model, weights, one)
    two = dpfix.Recording(case.inputs("decode"), outputs["decode"][0], "decode")
    assert not dpfix.verify_legacy(model, weights, [one, two])


def test_recordings_of_another_form_are_refused() -> None:
    weights, _ = load(AUTOENCODER)
    model = AUTOENCODER.build_new(nets)
    with pytest.raises(dpfix.ArgumentError, match="has the fields x, y"):
        dpfix.verify_legacy(model, weights, {"x": 1, "y": 2})
    with pytest.raises(dpfix.ArgumentError, match="holds no recording"):
        dpfix.verify_legacy(model, weights, [])
