"""The losses that the networks are trained with: from model and batch to a number."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks import nets
from monai.networks.blocks import Warp
from torch import Tensor, nn

from benchmarks.common.libraries import Step

DICE_CE = DiceCELoss(to_onehot_y=True, softmax=True)


def dice(model: nn.Module, batch: Any) -> Tensor:
    """Dice and cross-entropy over every output; deep supervision gives several, of which some are smaller."""
    out = model(batch[0])
    outputs = out if isinstance(out, (list, tuple)) else (out,)
    return torch.stack([dice_of(o, batch[1]) for o in outputs]).mean()


def dice_of(logits: Tensor, mask: Tensor) -> Tensor:
    if logits.shape[2:] != mask.shape[2:]:
        mask = F.interpolate(mask.float(), logits.shape[2:], mode="nearest").long()
    return DICE_CE(logits, mask)


def stacked_dice(model: nn.Module, batch: Any) -> Tensor:
    """As DynUNet returns deep supervision: all outputs in one tensor ``[batch, outputs, classes, *size]``."""
    return torch.stack([dice_of(o, batch[1]) for o in model(batch[0]).unbind(1)]).mean()


def classify(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out[0] if isinstance(out, tuple) else out, batch[1])


def regress(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def reconstruct(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.l1_loss(out[0] if isinstance(out, tuple) else out, batch[0])


def features(model: nn.Module, batch: Any) -> Tensor:
    """Backbones that return a list of feature maps: a linear classifier without weights on their averages."""
    pooled = torch.cat([f.flatten(2).mean(2) for f in model(batch[0]) if f is not None], 1)
    return F.cross_entropy(pooled[:, :3], batch[1]) + 0.1 * pooled.square().mean()


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def vae(model: nn.Module, batch: Any) -> Tensor:
    out, mean, log_variance, _ = model(batch[0])
    return F.mse_loss(out, batch[0]) + 0.1 * kl(mean, log_variance)


def vae_of_images(model: nn.Module, batch: Any) -> Tensor:
    """As the latent diffusion tutorials train ``AutoencoderKL``: the network returns the standard deviation."""
    out, mean, deviation = model(*batch)
    return F.l1_loss(out, batch[0]) + 0.1 * kl(mean, 2 * deviation.log())


def painting(model: nn.Module, batch: Any) -> Tensor:
    x, regions = batch
    out, mean, log_variance = model(regions, x)
    return F.l1_loss(out, x) + 0.1 * kl(mean, log_variance)


def codebook(model: nn.Module, batch: Any) -> Tensor:
    out, quantisation = model(batch[0])
    return F.l1_loss(out, batch[0]) + quantisation


def with_vae_branch(model: nn.Module, batch: Any) -> Tensor:
    logits, reconstruction = model(batch[0])
    return DICE_CE(logits, batch[1]) + 0.1 * reconstruction


def two_branches(model: nn.Module, batch: Any) -> Tensor:
    point, label = model(batch[0])
    return DICE_CE(point, batch[1]) + DICE_CE(label, batch[1])


def hovernet(model: nn.Module, batch: Any) -> Tensor:
    """Which pixels are nuclei, and how far they are from the middle of theirs; the borders are lost."""
    out, (_, mask, distances) = model(batch[0]), batch
    lost = (mask.shape[-1] - out["nucleus_prediction"].shape[-1]) // 2
    mask, distances = (t[..., lost:-lost, lost:-lost] for t in (mask, distances))
    return DICE_CE(out["nucleus_prediction"], mask) + F.mse_loss(out["horizontal_vertical"], distances)


def masked_patches(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error over the patches that were hidden; the same number in every sample."""
    out, mask = model(batch[0])
    patches = F.unfold(batch[0], 4, stride=4).transpose(1, 2)
    return (((out - patches) ** 2).mean(2) * mask).sum(1).div(mask.sum(1)).mean()


def next_token(model: nn.Module, batch: Any) -> Tensor:
    ids, *context = batch
    return F.cross_entropy(model(ids[:, :-1], *context).transpose(1, 2), ids[:, 1:])


def denoise(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error of the noise that was added at the sample's time step."""
    x, noise, step, *condition = batch
    return F.mse_loss(model(noisy(x, noise, step), step, *condition), noise)


def denoise_with(name: str) -> Step:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, noise, step, condition = batch
        return F.mse_loss(model(noisy(x, noise, step), step, **{name: condition}), noise)

    return loss


def noisy(x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    kept = (torch.cos(step.to(x.dtype) / 1000 * torch.pi / 2) ** 2).reshape(-1, *(1 for _ in x.shape[1:]))
    return kept.sqrt() * x + (1 - kept).sqrt() * noise


def discriminate(model: nn.Module, batch: Any) -> Tensor:
    real, fake = (model(x) for x in batch)
    return F.binary_cross_entropy(real, torch.ones_like(real)) + F.binary_cross_entropy(fake, torch.zeros_like(fake))


def criticise(model: nn.Module, batch: Any) -> Tensor:
    real, fake = (model(x) for x in batch)
    return fake.mean() - real.mean()


def patch_gan(model: nn.Module, batch: Any) -> Tensor:
    """Least squares on the last output, which holds one verdict per patch."""
    real, fake = (model(x)[-1] for x in batch)
    return (real - 1).square().mean() + fake.square().mean()


def several_scales(model: nn.Module, batch: Any) -> Tensor:
    (real, _), (fake, _) = (model(x) for x in batch)
    return sum((r - 1).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True))


@cache
def frozen_discriminator(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.Discriminator((1, 16, 16), (4, 8), (2, 2)).eval().requires_grad_(False).to(dtype)


def deceive(model: nn.Module, batch: Any) -> Tensor:
    """A generator is trained against a discriminator, which is not trained in this step."""
    verdict = frozen_discriminator(batch[0].dtype)(model(batch[0]))
    return F.binary_cross_entropy(verdict, torch.ones_like(verdict))


def registered(moving: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
    smooth = sum(field.diff(dim=d).square().mean() for d in range(2, field.dim()))
    return F.mse_loss(moving, fixed) + 0.1 * smooth


def warped(model: nn.Module, batch: Any) -> Tensor:
    """A displacement field from both images, and how well the moved one fits."""
    moving, fixed = batch
    field = model(torch.cat([moving, fixed], 1))
    return registered(Warp()(moving, field), fixed, field)


def voxelmorph(model: nn.Module, batch: Any) -> Tensor:
    moving, fixed = batch
    moved, field = model(moving, fixed)
    return registered(moved, fixed, field)


def image_and_report(model: nn.Module, batch: Any) -> Tensor:
    ids, pictures, label = batch
    return F.cross_entropy(model(ids, torch.zeros_like(ids), pictures), label)


def unequal_images(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model([[x] for x in images]), labels)


def by_class(model: nn.Module, batch: Any) -> Tensor:
    """VISTA3D asked for the same three classes in every image."""
    out = model(batch[0], class_vector=torch.arange(3), transpose=True)
    return F.binary_cross_entropy_with_logits(out, batch[1])


def by_points(model: nn.Module, batch: Any) -> Tensor:
    """VISTA3D asked with the points of an image."""
    *images_and_points, masks = batch
    return F.binary_cross_entropy_with_logits(model(*images_and_points), masks)


def token_features(model: nn.Module, batch: Any) -> Tensor:
    """A ViT without a classifier: the first features of the average token take its place."""
    return F.cross_entropy(model(batch[0])[0].mean(1)[:, :3], batch[1])
