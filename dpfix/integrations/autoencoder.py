"""The training step of a variational autoencoder (MONAI's ``AutoencoderKL``), sample by sample.

The loss of Rombach et al. 2022, https://arxiv.org/abs/2112.10752, has four terms. Reconstruction and KL divergence are sums
over one sample each, and the latent noise is drawn per sample, so they fit DP-SGD as they are. The other two bring a second
network along, and what matters is what that network has seen:

* a perceptual network with fixed weights from public data is a function of the sample; it is allowed when it is frozen;
* a discriminator that is trained along sees the private images itself, through an optimizer that nobody makes private and no
  accountant counts. It is refused. One with fixed weights is allowed like a perceptual network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpfix.errors import ArgumentError, LossError
from dpfix.repair.per_sample_loss import PerSampleLoss

RECONSTRUCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda restored, image: (restored - image).abs(),
    "l2": lambda restored, image: (restored - image).square(),
}


class AutoencoderStep:
    """``training_step`` for :func:`dpfix.make_private_safe`: the mean over the samples of each sample's loss.

    Args:
        reconstruction: ``"l1"`` or ``"l2"``, averaged over the values of a sample.
        kl_weight: weight of the KL divergence to the standard normal distribution, summed over a sample's latents.
        perceptual: ``(restored, image) -> scalar`` with a frozen network in ``eval()``; called for every sample alone.
        perceptual_weight: its weight.
        adversarial: ``restored -> scalar`` with a frozen discriminator in ``eval()``; called for every sample alone.
        adversarial_weight: its weight.
        key: where a batch that is a mapping holds the images; of a tuple the first item is taken.
    """

    def __init__(
        self,
        *,
        reconstruction: str = "l1",
        kl_weight: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1e-3,
        adversarial: nn.Module | None = None,
        adversarial_weight: float = 1e-2,
        key: str = "image",
    ) -> None:
        if reconstruction not in RECONSTRUCTIONS:
            raise ArgumentError(
                f"reconstruction={reconstruction!r} is none of {', '.join(map(repr, RECONSTRUCTIONS))}.",
                path="reconstruction",
            )
        self.reconstruction, self.kl_weight, self.key = RECONSTRUCTIONS[reconstruction], kl_weight, key
        self._terms: list[tuple[float, PerSampleLoss, bool]] = []
        for name, network, weight in (
            ("perceptual", perceptual, perceptual_weight),
            ("adversarial", adversarial, adversarial_weight),
        ):
            if network is not None:
                _check_frozen(name, network)
                self._terms.append((weight, PerSampleLoss(network), name == "perceptual"))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch.

        Args:
            model: returns ``(restored, mean, sigma)`` as ``AutoencoderKL`` does; images of ``[samples, channels, *spatial]``.
            batch: the images, alone or in a mapping or tuple.

        Returns:
            A scalar.
        """
        image = batch[self.key] if isinstance(batch, Mapping) else batch
        image = image[0] if isinstance(image, (tuple, list)) else image
        restored, mean, sigma = model(image)
        loss = self.reconstruction(restored, image).flatten(1).mean(1)
        loss = loss + self.kl_weight * kl_divergence(mean, sigma)
        total = loss.mean()
        for weight, term, compares in self._terms:
            total = total + weight * (term(restored, image) if compares else term(restored))
        return total


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence of independent normal distributions to the standard one, per sample.

    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, appendix B.

    Args:
        mean: means, ``[samples, ...]``.
        sigma: standard deviations of the same shape.

    Returns:
        One value per sample, in nats.

    >>> kl_divergence(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.ones(2, 2))
    tensor([0., 2.])
    """
    return 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).flatten(1).sum(1)


_REASONS = {
    "perceptual": (
        "a perceptual network that is trained along sees the private images through an optimizer of its own, which is not "
        "private",
        "Use public weights and freeze them",
    ),
    "adversarial": (
        "a discriminator that is trained along sees the private images through an optimizer of its own, which is not private "
        "and which no accountant counts; the autoencoder then learns from what the discriminator has memorised",
        "Leave the term out, or use a discriminator that was trained on public data and freeze it",
    ),
}


def _check_frozen(name: str, network: Any) -> None:
    if not isinstance(network, nn.Module):
        raise ArgumentError(
            f"{name} is a {type(network).__name__}; pass a torch.nn.Module, so that its weights can be seen to be frozen.",
            path=name,
        )
    why, way_out = _REASONS[name]
    kind = type(network).__name__
    way_out += ": network.eval().requires_grad_(False)."
    trainable = [key for key, p in network.named_parameters() if p.requires_grad]
    if trainable:
        raise LossError(
            f"{name}: {kind} has {len(trainable)} trainable parameters (`{trainable[0]}`, ...): {why}.",
            help=way_out,
            path=name,
        )
    training = [path for path, m in network.named_modules() if m.training and _has_state(m)]
    if training:
        layer = f"`{training[0]}`" if training[0] else "the network itself"
        raise LossError(
            f"{name}: {kind} is in training mode ({layer} would write statistics of the private images).",
            help=way_out,
            path=name,
        )


def _has_state(module: nn.Module) -> bool:
    return any(isinstance(b, torch.Tensor) for b in module.buffers(recurse=False))
