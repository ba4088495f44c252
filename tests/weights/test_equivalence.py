"""Two modules are compared by what they compute, layer by layer, and the place where they part is named."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import dpfix
from tests.helpers import generators_unchanged, setting


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


X = torch.arange(24.0).reshape(6, 4) / 10


def test_a_copy_is_equal_in_both_modes() -> None:
    a = mlp()
    report = dpfix.verify_equivalence(a, copy.deepcopy(a), X)
    assert report and report.equal and report.first is None and report.max_difference == 0
    assert report.layers == 2 * 5 and "equal: largest difference of the outputs 0.00e+00" in str(report)


def test_the_first_layer_that_parts_is_named_with_the_size() -> None:
    a = mlp()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[1].bias += 0.25
        b[4].bias += 5
    report = dpfix.verify_equivalence(a, b, X)
    assert not report and report.first is not None
    assert (report.first.path, report.first.mode) == ("1", "eval")
    assert math.isclose(report.first.size, 0.25, rel_tol=1e-6)
    assert "first parts at `1` in eval(): largest difference 2.50e-01" in str(report)


def test_a_difference_in_training_mode_alone_is_found() -> None:
    a = mlp()
    b = copy.deepcopy(a)
    b[3].p = 0.1
    report = dpfix.verify_equivalence(a, b, X)
    assert report.first is not None and (report.first.path, report.first.mode) == ("3", "train")


def test_objects_weights_and_generators_stay_as_they_are() -> None:
    a = mlp()
    before = copy.deepcopy(a.state_dict())
    with generators_unchanged():
        dpfix.verify_equivalence(a, mlp(), X, randomise=True, float64=True)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in a.state_dict().items())
    assert a.training and not a[0]._forward_hooks


class Gated(nn.Module):
    """A layer whose share of the output is multiplied by a weight that starts at zero."""

    def __init__(self, negative: bool) -> None:
        super().__init__()
        self.layer, self.gate, self.negative = nn.Linear(4, 4), nn.Parameter(torch.zeros(4)), negative

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return x + self.gate * (-h if self.negative else h)


def test_a_zero_weight_hides_a_fault_until_weights_are_drawn_anew() -> None:
    a, b = Gated(negative=False), Gated(negative=True)
    b.load_state_dict(a.state_dict())
    assert dpfix.verify_equivalence(a, b, X)
    report = dpfix.verify_equivalence(a, b, X, randomise=True)
    assert not report and report.max_difference > 0.01


class Twice(nn.Module):
    """Two dropouts, in one order or the other."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.one, self.two, self.swapped = nn.Dropout(0.5), nn.Dropout(0.5), swapped

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            second = self.two(x)
            return self.one(x) + 2 * second
        return self.one(x) + 2 * self.two(x)


def test_random_layers_may_draw_in_another_order() -> None:
    assert dpfix.verify_equivalence(Twice(False), Twice(True), X)


@dataclass
class Output:
    mean: Tensor
    more: tuple[Tensor, ...]


class Structured(nn.Module):
    """An output of a given structure."""

    def __init__(self, shift: float, kind: str) -> None:
        super().__init__()
        self.shift, self.kind = shift, kind

    def forward(self, x: Tensor) -> Any:
        moved = x + self.shift
        return {
            "tuple": (x, moved),
            "mapping": {"x": x, "deep": [moved]},
            "dataclass": Output(x, (moved,)),
            "packed": pack_sequence([moved[0], moved[1]]),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("tuple", "[1]"),
        ("mapping", "['deep'][0]"),
        ("dataclass", "['more'][0]"),
        ("packed", "['data']"),
    ],
)
def test_outputs_of_any_structure_are_compared(kind: str, place: str) -> None:
    a = Structured(0, kind)
    assert dpfix.verify_equivalence(a, Structured(0, kind), X)
    report = dpfix.verify_equivalence(a, Structured(1, kind), X)
    assert report.first is not None and (report.first.path, report.first.output) == ("", place)
    assert math.isclose(report.max_difference, 1, rel_tol=1e-6)


def test_outputs_of_different_structure_or_shape_are_not_equal() -> None:
    report = dpfix.verify_equivalence(Structured(0, "tuple"), Structured(0, "mapping"), X)
    assert not report and math.isinf(report.max_difference)
    report = dpfix.verify_equivalence(nn.Flatten(), nn.Identity(), X[:, :, None])
    assert "shapes [6, 4] and [6, 4, 1]" in str(report)


def test_not_a_number_is_never_equal() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    assert not dpfix.verify_equivalence(Broken(), Broken(), X)


def test_layers_of_other_names_are_compared_along_a_mapping() -> None:
    a = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    b = nn.ModuleDict({"alpha": a["first"], "beta": nn.Linear(4, 4)})
    chain = nn.Sequential(*a.values()), nn.Sequential(*b.values())
    report = dpfix.verify_equivalence(*chain, X, mapping={"0": "0", "1": "1"})
    assert report.first is not None and report.first.path == "1"
    with pytest.raises(dpfix.ArgumentError, match=r"mapping names '7', and a \(Sequential\) has no such module"):
        dpfix.verify_equivalence(*chain, X, mapping={"7": "0"})


def test_weights_of_other_keys_are_drawn_through_a_function() -> None:
    a = nn.Sequential(nn.Linear(4, 2))
    wrapped = nn.Sequential(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(dpfix.ArgumentError, match="randomise=True needs the same state-dict keys"):
        dpfix.verify_equivalence(a, wrapped, X, randomise=True)
    renamed = dpfix.verify_equivalence(a, wrapped, X, randomise=lambda s: {f"0.{k}": v for k, v in s.items()})
    assert renamed and renamed.randomised


def test_another_method_can_be_compared() -> None:
    class Coder(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def encode(self, x: Tensor) -> Tensor:
            return self.factor * x

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert dpfix.verify_equivalence(Coder(1), Coder(2), X)
    assert not dpfix.verify_equivalence(Coder(1), Coder(2), X, method="encode")


@pytest.mark.parametrize("mode", ["bookkeeping", "microbatch", "hooks"])
@pytest.mark.parametrize("wrap", [True, False])
def test_a_model_in_private_training_equals_its_original(mode: str, wrap: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))
    original = copy.deepcopy(model)
    private, *_ = dpfix.make_private_safe(**setting(model, grad_sample_mode=mode, wrap_model=wrap))
    report = dpfix.verify_equivalence(original, private, torch.randn(5, 6), randomise=True)
    assert report, str(report)
