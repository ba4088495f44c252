"""``PerSampleLoss``: the mean of a criterion's values for single samples; and why a loss couples the samples."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.losses import (
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    SSIMLoss,
    TverskyLoss,
)
from torch import Tensor, nn

import dpfix
from dpfix.audit.loss_causes import coupling_causes
from dpfix.repair.per_sample_loss import PerSampleLoss

N = 5


def scores(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(N, *shape, generator=draw, dtype=torch.float64)


def labels(*shape: int, classes: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, classes, (N, *shape), generator=draw)


def masks(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return (torch.rand(N, *shape, generator=draw) < 0.3).double()


def value_and_gradients(loss: Callable[..., Tensor], outputs: Any, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    """A loss and its gradient with respect to every output."""
    listed = [o.clone().requires_grad_() for o in (outputs if isinstance(outputs, list) else [outputs])]
    value = loss(listed if isinstance(outputs, list) else listed[0], *rest)
    return value.detach(), list(torch.autograd.grad(value, listed))


def one_by_one(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What ``PerSampleLoss`` is defined to be, written as plainly as can be; without it and without vmap."""

    def take(thing: Any, i: int) -> Any:
        if isinstance(thing, list):
            return [take(t, i) for t in thing]
        return thing[i : i + 1] if isinstance(thing, Tensor) else thing

    def looped(*args: Any) -> Tensor:
        return sum(loss(*(take(a, i) for a in args)) for i in range(N)) / N

    return looped


def assert_same(
    a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]], rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=atol)
    assert len(a[1]) == len(b[1])
    for found, wanted in zip(a[1], b[1], strict=True):
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found, wanted, rtol=10 * rtol, atol=atol)


SEGMENTATION = (scores(2, 6, 6), masks(2, 6, 6))
ONE_CHANNEL = (scores(1, 6, 6), masks(1, 6, 6))

UNCOUPLED: dict[str, tuple[Callable[..., Tensor], Any, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), scores(3), labels()),
    "cross entropy, function": (F.cross_entropy, scores(3), labels()),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), scores(3), labels()),
    "cross entropy of pixels": (nn.CrossEntropyLoss(), scores(3, 4, 4), labels(4, 4)),
    "cross entropy of probabilities": (nn.CrossEntropyLoss(), scores(3), scores(3).softmax(1)),
    "negative log likelihood": (nn.NLLLoss(), scores(3).log_softmax(1), labels()),
    "squared error": (nn.MSELoss(), scores(3, 4), scores(3, 4).flip(0)),
    "absolute error": (nn.L1Loss(), scores(7), scores(7).flip(0)),
    "huber": (nn.HuberLoss(), scores(7), scores(7).flip(0)),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), scores(7), masks(7)),
    "poisson": (nn.PoissonNLLLoss(), scores(7), masks(7)),
    "margin": (nn.MultiMarginLoss(), scores(3), labels()),
    "multi-label": (nn.MultiLabelSoftMarginLoss(), scores(3), masks(3)),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), scores(3).log_softmax(1), scores(3).flip(0).softmax(1)),
    "dice": (DiceLoss(sigmoid=True), *SEGMENTATION),
    "dice and cross entropy": (DiceCELoss(sigmoid=True), *ONE_CHANNEL),
    "dice, one-hot": (DiceLoss(softmax=True, to_onehot_y=True), scores(3, 6, 6), labels(1, 6, 6)),
    "dice without background": (DiceLoss(softmax=True, include_background=False), *SEGMENTATION),
    "dice and focal": (DiceFocalLoss(sigmoid=True), *SEGMENTATION),
    "focal": (FocalLoss(), *SEGMENTATION),
    "tversky": (TverskyLoss(sigmoid=True), *SEGMENTATION),
    "generalised dice": (GeneralizedDiceLoss(sigmoid=True), *SEGMENTATION),
    "structural similarity": (SSIMLoss(2, win_size=5), scores(1, 8, 8), scores(1, 8, 8).flip(0)),
    "deep supervision": (
        DeepSupervisionLoss(DiceCELoss(sigmoid=True)),
        [scores(1, 8, 8), scores(1, 4, 4)],
        masks(1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", UNCOUPLED)
def test_equals_a_criterion_that_does_not_couple(name: str) -> None:
    criterion, output, target = UNCOUPLED[name]
    wanted = value_and_gradients(criterion, output, target)
    # MONAI's focal loss and its deep supervision compute in single precision whatever they get.
    single = {"rtol": 1e-6, "atol": 1e-8} if "focal" in name or name == "deep supervision" else {}
    assert_same(value_and_gradients(PerSampleLoss(criterion), output, target), wanted, **single)


def ignored_labels(*shape: int) -> Tensor:
    """A different number of ignored elements in every sample; in the last one all of them."""
    y = labels(*shape)
    flat = y.view(N, -1)
    for i in range(N):
        flat[i, : i * flat.shape[1] // (N - 1)] = -100
    return y


COUPLED: dict[str, tuple[Callable[..., Tensor], Any, Tensor]] = {
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]).double()),
        scores(3, 4),
        labels(4),
    ),
    "class weights of one label": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]).double()),
        scores(3),
        labels(),
    ),
    "batch dice": (DiceLoss(sigmoid=True, batch=True), *SEGMENTATION),
    "batch dice, an empty mask": (DiceLoss(sigmoid=True, batch=True), scores(1, 6, 6), masks(1, 6, 6) * (labels(1, 1, 1) > 0)),
    "batch dice and cross entropy": (DiceCELoss(sigmoid=True, batch=True), *ONE_CHANNEL),
    "generalised dice over the batch": (GeneralizedDiceLoss(sigmoid=True, batch=True), *SEGMENTATION),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), scores(3), labels()),
    "divergence of the elements": (
        nn.KLDivLoss(reduction="sum"),
        scores(3).log_softmax(1),
        scores(3).flip(0).softmax(1),
    ),
    "worst pixels": (
        lambda out, y: F.cross_entropy(out, y, reduction="none").flatten().topk(4).values.mean(),
        scores(3, 4, 4),
        labels(4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_is_the_mean_over_single_samples(name: str) -> None:
    criterion, output, target = COUPLED[name]
    found = value_and_gradients(PerSampleLoss(criterion), output, target)
    assert_same(found, value_and_gradients(one_by_one(criterion), output, target))


@pytest.mark.parametrize("name", [name for name in COUPLED if name != "batch dice, an empty mask"])
def test_the_criterion_alone_would_be_another_loss(name: str) -> None:
    criterion, output, target = COUPLED[name]
    found, wanted = (value_and_gradients(loss, output, target)[1][0] for loss in (PerSampleLoss(criterion), criterion))
    assert float((found - wanted).norm() / wanted.norm()) > 1e-3


# ------------------------------------------------------------------ samples in which nothing counts


def valid_mean(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross entropy over the valid elements of every sample, 0 where there is none, averaged over the samples."""
    total = output.new_zeros(())
    for out, y in zip(output, target, strict=True):
        kept = y >= 0
        if weight is not None:
            kept &= weight[y.clamp(min=0)] > 0
        if bool(kept.any()):
            total = total + F.cross_entropy(out[:, kept].t(), y[kept], weight)
    return total / len(output)


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(), F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.0)],
    ids=("module", "function", "partial"),
)
def test_sample_with_all_elements_ignored_counts_nothing(criterion: Any) -> None:
    output, target = scores(3, 8), ignored_labels(8)
    assert bool((target[-1] == -100).all()) and not bool((target[0] == -100).any())
    found = value_and_gradients(PerSampleLoss(criterion), output, target)
    assert_same(found, value_and_gradients(valid_mean, output, target))
    assert not found[1][0][-1].any()


def test_sample_of_classes_without_weight_counts_nothing() -> None:
    weight = torch.tensor([0.0, 1.0, 2.0]).double()
    output, target = scores(3, 4), labels(4)
    target[1] = 0
    found = value_and_gradients(PerSampleLoss(nn.CrossEntropyLoss(weight)), output, target)
    assert_same(found, value_and_gradients(functools.partial(valid_mean, weight=weight), output, target))
    assert not found[1][0][1].any()


def test_batch_in_which_nothing_counts_is_zero_with_zero_gradient() -> None:
    value, (gradient,) = value_and_gradients(
        PerSampleLoss(nn.CrossEntropyLoss()), scores(3, 4), torch.full((N, 4), -100)
    )
    assert float(value) == 0 and not gradient.any()


@pytest.mark.parametrize("how", ["object", "keyword"])
def test_another_ignore_index_is_known(how: str) -> None:
    output, target = scores(3), torch.tensor([0, 1, 2, 1, 0])
    if how == "object":
        loss: Any = PerSampleLoss(nn.CrossEntropyLoss(ignore_index=1))
    else:
        loss = functools.partial(PerSampleLoss(F.cross_entropy), ignore_index=1)
    value = loss(output, target)
    wanted = sum(F.cross_entropy(output[i : i + 1], target[i : i + 1]) for i in (0, 2, 4)) / N
    torch.testing.assert_close(value, wanted)


# ------------------------------------------------------------------ vectorised, or a loop


def calls(criterion: Callable[..., Tensor]) -> tuple[list[int], Callable[..., Tensor]]:
    """A criterion that counts how often it is called."""
    counter = [0]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        counter[0] += 1
        return criterion(*args, **kwargs)

    return counter, counted


def test_a_criterion_that_vmap_follows_is_called_once_a_batch() -> None:
    counter, counted = calls(F.mse_loss)
    loss = PerSampleLoss(counted)
    loss(scores(4), scores(4).flip(0))  # compared with the loop
    counter[0] = 0
    loss(scores(4) + 1, scores(4).flip(0))
    assert counter[0] == 1


def test_a_branch_on_the_data_is_followed_by_a_loop() -> None:
    def branching(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() if bool(target.sum() > 0) else output.abs().mean()

    counter, counted = calls(branching)
    loss = PerSampleLoss(counted)
    output, target = scores(4), masks(4)
    target[0] = 0
    loss(output, target)
    counter[0] = 0
    assert_same(value_and_gradients(loss, output, target), value_and_gradients(one_by_one(branching), output, target))
    assert counter[0] == N


def test_a_random_criterion_draws_for_every_sample_as_in_a_loop() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return (output + torch.randn_like(output) - target).square().mean()

    torch.manual_seed(3)
    found = PerSampleLoss(noisy)(scores(4), masks(4))
    torch.manual_seed(3)
    torch.testing.assert_close(found, one_by_one(noisy)(scores(4), masks(4)))


def test_other_shapes_and_single_samples() -> None:
    loss = PerSampleLoss(DiceLoss(sigmoid=True, batch=True))
    for output, target in (SEGMENTATION, ONE_CHANNEL, (scores(1, 4, 4, 4), masks(1, 4, 4, 4))):
        assert_same(
            value_and_gradients(loss, output, target),
            value_and_gradients(one_by_one(loss.criterion), output, target),
        )
        torch.testing.assert_close(loss(output[:1], target[:1]), loss.criterion(output[:1], target[:1]))


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    PerSampleLoss(nn.CrossEntropyLoss())(scores(3), labels())
    assert torch.equal(torch.get_rng_state(), before)


def test_further_arguments_may_be_anything() -> None:
    def scaled(output: Tensor, target: Tensor, factor: float, *, names: list[str], scale: Tensor) -> Tensor:
        assert names == ["a"]
        return factor * scale * (output - target).square().mean()

    found = PerSampleLoss(scaled)(scores(4), masks(4), 2.0, names=["a"], scale=torch.tensor(3.0))
    torch.testing.assert_close(found, 6 * F.mse_loss(scores(4), masks(4)))


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("output", "target", "rows"),
    [(scores(3), labels()[:2], r"\[2, 5\] rows"), (scores(3)[:0], labels()[:0], r"\[0\] rows")],
)
def test_unequal_or_no_samples_are_refused(output: Tensor, target: Tensor, rows: str) -> None:
    with pytest.raises(dpfix.LossError, match=rows):
        PerSampleLoss(nn.CrossEntropyLoss())(output, target)


def test_no_tensor_at_all_is_refused() -> None:
    with pytest.raises(dpfix.LossError, match=r"\[\] rows"):
        PerSampleLoss(nn.CrossEntropyLoss())(1.0, 2.0)


def test_the_criterions_own_error_comes_through() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        PerSampleLoss(nn.CrossEntropyLoss())(scores(3), labels() + 3)


# ------------------------------------------------------------------ causes


class NTXentLoss(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(a @ b.t(), torch.arange(len(a)))


class TopKCrossEntropy(nn.CrossEntropyLoss):
    pass


WEIGHT = torch.tensor([1.0, 2.0, 3.0])
CAUSES: dict[str, tuple[nn.Module, str]] = {
    "batch": (DiceLoss(batch=True), "DiceLoss(batch=True)"),
    "inside": (DiceCELoss(batch=True), "DiceLoss(batch=True)"),
    "weight": (nn.CrossEntropyLoss(WEIGHT), "CrossEntropyLoss(weight=..., reduction='mean')"),
    "weight, nll": (nn.NLLLoss(WEIGHT), "NLLLoss(weight=..., reduction='mean')"),
    "ignore": (nn.CrossEntropyLoss(ignore_index=0), "ignore_index=0"),
    "contrast": (NTXentLoss(), "NTXentLoss compares the samples"),
    "top k": (TopKCrossEntropy(), "TopKCrossEntropy keeps the worst elements"),
    "wrapped": (DeepSupervisionLoss(DiceLoss(batch=True)), "DiceLoss(batch=True)"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_cause_is_named(name: str) -> None:
    criterion, text = CAUSES[name]
    batch = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert any(text in cause for cause in coupling_causes(criterion, None, batch))
    assert any(text in cause for cause in coupling_causes(None, lambda model, b: criterion(model(b[0]), b[1]), batch))


def test_batch_dice_of_nnunet_is_named() -> None:
    class MemoryEfficientSoftDiceLoss(nn.Module):
        batch_dice = True

    assert "batch_dice=True" in coupling_causes(MemoryEfficientSoftDiceLoss(), None, ())[0]


def test_ignored_targets_are_named_without_an_object() -> None:
    batch = (torch.zeros(2, 3), torch.tensor([[1, -100], [0, 1]]))
    assert "ignore_index" in coupling_causes(F.cross_entropy, None, batch)[0]


@pytest.mark.parametrize(
    "harmless",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(WEIGHT, reduction="none"),
        nn.CrossEntropyLoss(WEIGHT, reduction="sum"),
        DiceLoss(),
        PerSampleLoss(DiceLoss(batch=True)),
        PerSampleLoss(nn.CrossEntropyLoss(WEIGHT)),
    ],
)
def test_harmless_losses_have_no_cause(harmless: nn.Module) -> None:
    batch = (torch.zeros(2, 3), torch.tensor([1, 0]))
    assert coupling_causes(harmless, None, batch) == []


def test_every_cause_once() -> None:
    loss = DiceLoss(batch=True)
    found = coupling_causes(loss, lambda model, b: loss(model(b[0]), b[1]), ())
    assert len(found) == len(set(found)) == 1


def test_public_name() -> None:
    assert dpfix.PerSampleLoss is PerSampleLoss
    assert inspect.signature(PerSampleLoss).parameters.keys() == {"criterion"}
    assert math.isclose(float(PerSampleLoss(F.mse_loss)(torch.ones(2, 3), torch.zeros(2, 3))), 1.0)
