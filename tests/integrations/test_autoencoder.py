"""MONAI's AutoencoderKL, from a checkpoint of monai-generative, trained privately and given back."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import AutoencoderKL, PatchDiscriminator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.integrations.autoencoder import AutoencoderStep
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one, norm
from tests.weights.legacy_zoo import ZOO
from tests.weights.record_legacy import load

CASE = ZOO[0]


def images(samples: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"image": torch.randn(1, 8, 8).double()} for _ in range(samples)]


def autoencoder() -> Any:
    import monai.networks.nets as nets

    model = CASE.build_new(nets).train()
    dpfix.load_pretrained(model, load(CASE)[0])
    return model


class Features(nn.Module):
    """A perceptual distance: squared distance of the features of a small fixed network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net(a) - self.net(b)).square().mean()


class Judge(nn.Module):
    """The generator's term of a least-squares GAN (Mao et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = PatchDiscriminator(2, 2, 1, num_layers_d=1).double()

    def forward(self, restored: Tensor) -> Tensor:
        return (self.net(restored)[-1] - 1).square().mean()


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "perceptual": {"perceptual": Features},
    "adversarial": {"adversarial": Judge},
}


@pytest.mark.parametrize("more", TERMS.values(), ids=TERMS)
def test_the_clipped_sum_is_that_of_single_samples(more: dict[str, Any]) -> None:
    """One step without noise moves the weights by the mean of clipped gradients of batches of one.

    The latent noise is drawn anew in every call, so it is switched off for the comparison; the audit inside the call
    holds it fixed per sample and compares with it.
    """
    terms = {name: frozen(build()) for name, build in more.items()}
    step, model = AutoencoderStep(kl_weight=1e-3, **terms), autoencoder()
    model.sampling = lambda mean, sigma: mean
    clip = 0.5
    singles = [{"image": sample["image"][None]} for sample in images()]
    by_sample = gradients_one_by_one(model, step, singles)
    wanted = clipped_sum(by_sample, clip)
    assert max(map(norm, by_sample)) > clip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=DataLoader(images(), batch_size=8), training_step=step,
        noise_multiplier=0.0, max_grad_norm=clip, poisson_sampling=False,
    )  # fmt: skip
    private, optimizer, loader = training
    for batch in loader:
        optimizer.zero_grad()
        step(private, batch).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close((before[name] - p).double(), wanted[name] / len(singles), rtol=1e-6, atol=1e-9)


def test_it_trains_with_its_own_randomness_and_goes_back() -> None:
    step, model = AutoencoderStep(kl_weight=1e-3), autoencoder()
    original = copy.deepcopy(model)
    training = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        data_loader=DataLoader(images(), batch_size=4), training_step=step, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    private, optimizer, loader = training
    for batch in loader:
        optimizer.zero_grad()
        step(private, batch).backward()
        optimizer.step()
    assert training.get_epsilon(1e-2) > 0
    original.load_state_dict(dpfix.plain_state_dict(private), strict=True)
    assert dpfix.verify_equivalence(original, private, CASE.inputs("forward"))


@pytest.mark.parametrize(
    ("term", "build", "text"),
    [
        ("perceptual", Features, "perceptual: Features has 4 trainable parameters"),
        (
            "adversarial",
            Judge,
            "discriminator that is trained along sees the private images through an optimizer of its own",
        ),
        (
            "perceptual",
            lambda: Features().requires_grad_(False),
            r"`net.1` would write statistics of the private images",
        ),
    ],
)
def test_networks_that_are_trained_along_are_refused(term: str, build: Any, text: str) -> None:
    with pytest.raises(dpfix.LossError, match=text):
        AutoencoderStep(**{term: build()})


def test_other_values_are_named() -> None:
    with pytest.raises(dpfix.ArgumentError, match="reconstruction='l3' is none of 'l1', 'l2'"):
        AutoencoderStep(reconstruction="l3")
    with pytest.raises(dpfix.ArgumentError, match="perceptual is a function"):
        AutoencoderStep(perceptual=lambda a, b: a)  # type: ignore[arg-type]


def test_a_tuple_holds_the_images_first() -> None:
    model = autoencoder().eval()
    model.sampling = lambda mean, sigma: mean
    step, x = AutoencoderStep(reconstruction="l2", kl_weight=0.0), images()[0]["image"][None]
    assert isinstance(model, AutoencoderKL)
    expected = (model(x)[0] - x).square().mean()
    assert torch.equal(step(model, (x, None)), expected) and torch.equal(step(model, x), expected)


# ------------------------------------------------------------------ the example

EXAMPLE = Path(__file__).parents[2] / "examples/autoencoder.py"


def test_the_checkpoint_of_the_example_reproduces_its_recording() -> None:
    spec = importlib.util.spec_from_file_location("autoencoder_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    _, held_out = example.private_digits()
    ours, theirs = (
        example.error(build(), held_out) for build in (example.from_checkpoint, example.from_checkpoint_by_monai)
    )
    assert ours < 0.6 * theirs


@pytest.mark.slow
def test_the_example_runs() -> None:
    command = [sys.executable, str(EXAMPLE), "--epochs", "2"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert "| checkpoint, dpfix | private |" in run.stdout and "exported weights in a fresh AutoencoderKL" in run.stdout
