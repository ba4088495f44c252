"""The networks of ``monai.networks.nets``, small, each with samples and the loss it is trained with.

Networks are 2D where they can be: the layers are the same and the table takes less time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks import nets
from monai.networks.nets.restormer import Restormer
from monai.networks.nets.vista3d import ClassMappingClassify, PointMappingSAM
from torch import Tensor, nn

from benchmarks.common.libraries import Step
from benchmarks.zoo.losses import (
    by_class,
    by_points,
    classify,
    codebook,
    criticise,
    deceive,
    denoise,
    denoise_with,
    dice,
    discriminate,
    features,
    hovernet,
    image_and_report,
    masked_patches,
    next_token,
    painting,
    patch_gan,
    reconstruct,
    regress,
    several_scales,
    stacked_dice,
    token_features,
    two_branches,
    unequal_images,
    vae,
    vae_of_images,
    voxelmorph,
    warped,
    with_vae_branch,
)
from benchmarks.zoo.network import Network
from benchmarks.zoo.samples import (
    Sample,
    both,
    clicks,
    image,
    layout_and,
    lists,
    masked,
    noised,
    pair,
    three_masks,
    tokens,
    unequal,
)

# ------------------------------------------------------------------ networks that take more than a line


class Controlled(nn.Module):
    """A ControlNet on a diffusion model that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusion().requires_grad_(False)
        nn.init.normal_(
            self.unet.out[-1].conv.weight, std=0.1
        )  # zeros before it is trained, and no gradient would pass
        self.control = nets.ControlNet(
            2, 1, **DIFFUSION, conditioning_embedding_in_channels=1, conditioning_embedding_num_channels=(4,)
        )

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        down, middle = self.control(x, steps, condition)
        return self.unet(x, steps, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle)


class OneByOne(nn.Module):
    """VISTA3D with points, image by image: its point head takes one image per call."""

    def __init__(self) -> None:
        super().__init__()
        self.vista = vista3d()

    def forward(self, images: Tensor, points: Tensor, kinds: Tensor) -> Tensor:
        each = zip(*(t.split(1) for t in (images, points, kinds)), strict=True)
        return torch.cat([self.vista(x, point_coords=p, point_labels=kind) for x, p, kind in each])


DIFFUSION: dict[str, Any] = {
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
LATENT: dict[str, Any] = {
    "spatial_dims": 2,
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "latent_channels": 2,
    "norm_num_groups": 4,
}
SENET: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "num_classes": 3, "layers": (1, 1, 1, 1)}


def diffusion(**options: Any) -> nn.Module:
    return nets.DiffusionModelUNet(2, 1, 1, **(DIFFUSION | options))


def dints(search: bool) -> nn.Module:
    space = nets.TopologySearch if search else nets.TopologyInstance
    topology = space(channel_mul=0.2, num_blocks=2, num_depths=2, spatial_dims=2, use_downsample=True, device="cpu")
    node_a = torch.ones(3, 2)
    return nets.DiNTS(topology, 1, 2, spatial_dims=2, use_downsample=True, node_a=node_a)


def bags(mode: str, backbone: Callable[[], nn.Module] | None = None) -> Callable[[], nn.Module]:
    def small() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    return lambda: nets.MILModel(
        3, mode, pretrained=False, backbone=(backbone or small)(), backbone_num_features=32, trans_blocks=1
    )


def short_resnet(**options: Any) -> nn.Module:
    """A ResNet with 32 features."""
    return nets.ResNet("basic", [1, 1, 1, 1], [4, 8, 16, 32], 2, 3, **options)


def transchex(**options: Any) -> nn.Module:
    """It loads its language model from a file; here from one that holds no weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({}, Path(folder) / "pytorch_model.bin")
        return nets.Transchex(3, (32, 32), (16, 16), 3, path_or_repo_id=folder, **options)


def vista3d() -> nn.Module:
    encoder = nets.SegResNetDS2(
        in_channels=1, blocks_down=(1, 1), norm="instance", out_channels=8, init_filters=8, dsdepth=1
    )
    points = PointMappingSAM(feature_size=8, n_classes=16, last_supported=8)
    classes = ClassMappingClassify(n_classes=16, feature_size=8, use_mlp=True)
    return nets.VISTA3D(image_encoder=encoder, class_head=classes, point_head=points)


# ------------------------------------------------------------------ the table

SEGMENTATION, CLASSIFICATION, REGRESSION = "segmentation", "classification", "regression and restoration"
AUTOENCODER, DIFFUSING, LANGUAGE = "autoencoders", "diffusion", "transformers"
ADVERSARIAL, REGISTRATION = "adversarial", "registration"


def _segmentation() -> list[Network]:
    def row(name: str, build: Callable[[], nn.Module], sample: Sample, loss: Step = dice, **options: Any) -> Network:
        return Network(name, SEGMENTATION, build, sample, loss, **options)

    flat, solid, large = masked(1, 32, 32), masked(1, 16, 16, 16), masked(1, 64, 64)
    unet: dict[str, Any] = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": (4, 8, 8),
        "strides": (2, 2),
    }
    small: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    kernels: dict[str, Any] = {
        "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]
    }  # fmt: skip
    ds: dict[str, Any] = {"init_filters": 4, "blocks_down": (1, 1, 1), **small}
    swin: dict[str, Any] = {
        "feature_size": 12,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "window_size": 4,
        **small,
    }
    basic = (4, 4, 8, 8, 8, 4)
    return [
        row("AHNet, nearest", lambda: nets.AHNet((1, 1, 1, 1), 2, 1, 2, psp_block_num=1, upsample_mode="nearest"),
            large, samples=12),
        row("AHNet, transpose", lambda: nets.AHNet((1, 1, 1, 1), 2, 1, 2, psp_block_num=1), large, samples=12),
        row("AttentionUnet", lambda: nets.AttentionUnet(**unet), solid),
        row("BasicUNet", lambda: nets.BasicUNet(features=basic, **small), flat),
        row("BasicUNet, batch norm", lambda: nets.BasicUNet(features=basic, norm="batch", **small), flat),
        row("BasicUNetPlusPlus, deep supervision",
            lambda: nets.BasicUNetPlusPlus(features=basic, deep_supervision=True, **small), flat),
        row("DAF3D", lambda: nets.DAF3D(1, 2), masked(1, 32, 32, 32), dtype=torch.float32, samples=6),
        row("DiNTS, instance", lambda: dints(search=False), flat),
        row("DiNTS, search", lambda: dints(search=True), flat),
        row("DynUNet", lambda: nets.DynUNet(**kernels, **unet_dims(3)), solid),
        row("DynUNet, deep supervision, residual",
            lambda: nets.DynUNet(deep_supervision=True, res_block=True, **kernels, **unet_dims(2)), flat, stacked_dice),
        row("FlexibleUNet, EfficientNet", lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0"), masked(3, 64, 64), samples=12),
        row("FlexibleUNet, ResNet", lambda: nets.FlexibleUNet(3, 2, "resnet10", decoder_channels=(32, 16, 8, 8, 8)),
            masked(3, 64, 64), samples=12),
        row("HighResNet", lambda: nets.HighResNet(2, 1, 2), flat, samples=12),
        row("HoVerNet", lambda: nets.HoVerNet("fast", np_out_channels=2), both(masked(3, 256, 256), image(2, 256, 256)), hovernet,
            dtype=torch.float32, samples=6,
            heavy="takes 256 x 256 pixels and nothing else: 15 seconds per sample on one CPU core"),
        row("HyenaNDUNETR", lambda: nets.HyenaNDUNETR(1, 2, (True, True, False, False), 12, spatial_dims=2), large),
        row("MedNeXt", lambda: nets.MedNeXt(init_filters=4, kernel_size=3, blocks_down=(1, 1), blocks_bottleneck=1,
                                            blocks_up=(1, 1), **small), flat),
        row("MedNeXt, response norm, deep supervision",
            lambda: nets.MedNeXt(init_filters=4, kernel_size=3, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1),
                                 deep_supervision=True, global_resp_norm=True, use_residual_connection=True, **small), flat),
        row("QuickNAT", lambda: nets.Quicknat(num_classes=2, num_filters=8), large, samples=12),
        row("SegResNet", lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), **small), flat),
        row("SegResNetDS", lambda: nets.SegResNetDS(dsdepth=2, **ds), flat),
        row("SegResNetDS2", lambda: nets.SegResNetDS2(**ds), flat, two_branches),
        row("SegResNetVAE",
            lambda: nets.SegResNetVAE((32, 32), vae_estimate_std=True, vae_nz=8, blocks_down=(1, 1), blocks_up=(1,), **small),
            flat, with_vae_branch),
        row("SwinUNETR", lambda: nets.SwinUNETR(**swin), large, samples=12),
        row("SwinUNETR, v2, merging v2", lambda: nets.SwinUNETR(use_v2=True, downsample="mergingv2", **swin), large, samples=12),
        row("SwinUNETR, checkpoints, drop path",
            lambda: nets.SwinUNETR(use_checkpoint=True, dropout_path_rate=0.2, **swin), large, samples=12),
        row("UNet", lambda: nets.UNet(**unet), solid),
        row("UNet, residual, batch norm, dropout",
            lambda: nets.UNet(num_res_units=2, norm="batch", dropout=0.2, **unet), solid),
        row("UNETR", lambda: nets.UNETR(1, 2, 32, feature_size=8, hidden_size=16, mlp_dim=32, num_heads=2,
                                        norm_name="instance", spatial_dims=2), flat),
        row("VISTA3D, classes", vista3d, three_masks, by_class, samples=12),
        row("VISTA3D, points", OneByOne, clicks, by_points, dtype=torch.float32, samples=12),
        row("VNet", lambda: nets.VNet(2, 1, 2, dropout_dim=2), flat, samples=12),
    ]  # fmt: skip


def unet_dims(dims: int) -> dict[str, int]:
    return {"spatial_dims": dims, "in_channels": 1, "out_channels": 2}


def _classification() -> list[Network]:
    def row(
        name: str, build: Callable[[], nn.Module], sample: Sample, loss: Step = classify, **options: Any
    ) -> Network:
        return Network(name, CLASSIFICATION, build, sample, loss, **options)

    grey, colour, large = (image(c, n, n, classes=3) for c, n in ((1, 32), (3, 32), (3, 64)))
    bag = image(4, 3, 16, 16, classes=3)
    vit: dict[str, Any] = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "spatial_dims": 2}
    bert: dict[str, Any] = {
        "num_language_layers": 1, "num_vision_layers": 1, "num_mixed_layers": 1, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 16, "num_hidden_layers": 1,
    }  # fmt: skip
    return [
        row("Classifier", lambda: nets.Classifier((1, 32, 32), 3, (4, 8), (2, 2)), grey),
        row("DenseNet", lambda: nets.DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)), grey),
        row("DenseNet121, 3D", lambda: nets.DenseNet121(3, 1, 3, 8, 4, (1, 1, 1, 1)),
            image(1, 64, 64, 64, classes=3), samples=6),
        row("EfficientNetBN", lambda: nets.EfficientNetBN("efficientnet-b0", False, num_classes=3), large, samples=12),
        row("EfficientNetBNFeatures", lambda: nets.EfficientNetBNFeatures("efficientnet-b0", False),
            large, features, samples=12),
        *(row(f"MILModel, {mode}", bags(mode), bag) for mode in ("mean", "max", "att", "att_trans")),
        row("MILModel, att, ResNet", bags("att", lambda: short_resnet(feed_forward=False)), bag),
        row("NaViT, images of one size", lambda: nets.NaViT(24, 8, 3, dim_head=8, **vit),
            image(1, 16, 24, classes=3), unequal_images),
        row("NaViT", lambda: nets.NaViT(24, 8, 3, dim_head=8, **vit), unequal, unequal_images, collate=lists),
        row("NetAdapter",
            lambda: nets.NetAdapter(short_resnet(), 3, 2, 32, pool=("avg", {"kernel_size": 2, "stride": 1})), colour),
        row("ResNet, basic blocks, 3D", lambda: nets.ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], 3, 1, num_classes=3),
            image(1, 32, 32, 32, classes=3), samples=12),
        row("ResNet, bottlenecks", lambda: nets.ResNet("bottleneck", [1, 1, 1, 1], [4, 8, 8, 8], 2, 3, num_classes=3), colour),
        row("ResNetFeatures", lambda: nets.ResNetFeatures("resnet10", False, 2, 3), large, features, samples=12),
        row("SENet154", lambda: nets.SENet154(**SENET), large, samples=12),
        row("SEResNet50", lambda: nets.SEResNet50(**SENET), large, samples=12),
        row("SEResNext50", lambda: nets.SEResNext50(**SENET), large, samples=12),
        row("TorchVisionFCModel", lambda: nets.TorchVisionFCModel("resnet18", 3), colour),
        row("Transchex", lambda: transchex(**bert),
            both(tokens(64, 8), image(3, 32, 32, classes=3)), image_and_report),
        row("ViT, class token", lambda: nets.ViT(1, 32, 8, classification=True, num_classes=3, **vit), grey),
        row("ViT, perceptron, features",
            lambda: nets.ViT(1, 32, 8, proj_type="perceptron", pos_embed_type="sincos", **vit), grey, token_features),
    ]  # fmt: skip


def _regression() -> list[Network]:
    def row(name: str, build: Callable[[], nn.Module], sample: Sample) -> Network:
        return Network(name, REGRESSION, build, sample, regress)

    restored = both(image(1, 16, 16), image(1, 16, 16))
    return [
        row("FullyConnectedNet", lambda: nets.FullyConnectedNet(6, 3, (8, 8), dropout=0.1), both(image(6), image(3))),
        row("Regressor", lambda: nets.Regressor((1, 16, 16), (3,), (4, 8), (2, 2)), both(image(1, 16, 16), image(3))),
        row("Restormer", lambda: Restormer(2, 1, 1, 8, (1, 1), (1, 2), num_refinement_blocks=1), restored),
    ]


def _autoencoders() -> list[Network]:
    def row(
        name: str, build: Callable[[], nn.Module], sample: Sample, loss: Step = reconstruct, **options: Any
    ) -> Network:
        return Network(name, AUTOENCODER, build, sample, loss, **options)

    small = image(1, 16, 16)
    vit: dict[str, Any] = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "spatial_dims": 2}
    decoder: dict[str, Any] = {
        "decoder_hidden_size": 16,
        "decoder_mlp_dim": 32,
        "decoder_num_layers": 1,
        "decoder_num_heads": 2,
    }
    return [
        row("AutoEncoder", lambda: nets.AutoEncoder(2, 1, 1, (4, 8), (2, 2)), small),
        row("AutoEncoder, residual, inner layers",
            lambda: nets.AutoEncoder(2, 1, 1, (4, 8), (2, 2), num_res_units=2, inter_channels=[8], inter_dilations=[1]), small),
        row("AutoencoderKL", lambda: nets.AutoencoderKL(**LATENT), small, vae_of_images),
        row("AutoencoderKL, combined linear",
            lambda: nets.AutoencoderKL(use_combined_linear=True, **LATENT), small, vae_of_images),
        row("AutoencoderKL, checkpoints",
            lambda: nets.AutoencoderKL(use_checkpoint=True, use_convtranspose=True, **LATENT), small, vae_of_images),
        row("MaskedAutoEncoderViT", lambda: nets.MaskedAutoEncoderViT(1, 16, 4, **vit, **decoder), small, masked_patches),
        row("SPADEAutoencoderKL", lambda: nets.SPADEAutoencoderKL(label_nc=3, spade_intermediate_channels=8, **LATENT),
            layout_and(small, 3, 16, 16), vae_of_images),
        row("VarAutoEncoder", lambda: nets.VarAutoEncoder(2, (1, 16, 16), 1, 3, (4, 8), (2, 2)), small, vae),
        row("VarFullyConnectedNet", lambda: nets.VarFullyConnectedNet(6, 6, 3, (8, 8), (8, 8), dropout=0.1), image(6), vae),
        row("ViTAutoEnc", lambda: nets.ViTAutoEnc(1, 32, 16, **vit), image(1, 32, 32)),
        row("VQVAE",
            lambda: nets.VQVAE(2, 1, 1, (8, 8), 1, (8, 8), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 8, 4, ddp_sync=False),
            small, codebook, dtype=torch.float32, refusal="DPF012"),
    ]  # fmt: skip


def _generative() -> list[Network]:
    def row(name: str, build: Callable[[], nn.Module], sample: Sample, loss: Step = denoise, **options: Any) -> Network:
        return Network(name, DIFFUSING, build, sample, loss, **options)

    small, context = noised(1, 16, 16), image(5, 8)
    label: Sample = lambda g: (torch.randint(4, (), generator=g),)  # noqa: E731
    attended: dict[str, Any] = {"with_conditioning": True, "cross_attention_dim": 8}
    words: dict[str, Any] = {
        "num_tokens": 20,
        "max_seq_len": 8,
        "attn_layers_dim": 16,
        "attn_layers_depth": 2,
        "attn_layers_heads": 2,
    }
    return [
        row("DiffusionModelUNet", diffusion, small),
        row("DiffusionModelUNet, cross-attention", lambda: diffusion(**attended), both(small, context), denoise_with("context")),
        row("DiffusionModelUNet, classes, residual up and down", lambda: diffusion(num_class_embeds=4, resblock_updown=True),
            both(small, label), denoise_with("class_labels")),
        row("SPADEDiffusionModelUNet",
            lambda: nets.SPADEDiffusionModelUNet(2, 1, 1, 3, spade_intermediate_channels=8, **DIFFUSION),
            layout_and(small, 3, 16, 16)),
        row("ControlNet", Controlled, both(small, image(1, 16, 16))),
        Network("DecoderOnlyTransformer", LANGUAGE, lambda: nets.DecoderOnlyTransformer(**words), tokens(20, 9), next_token),
        Network("DecoderOnlyTransformer, cross-attention", LANGUAGE,
                lambda: nets.DecoderOnlyTransformer(with_cross_attention=True, **words),
                both(tokens(20, 9), image(5, 16)), next_token),
    ]  # fmt: skip


def _pairs() -> list[Network]:
    def gan(name: str, build: Callable[[], nn.Module], sample: Sample, loss: Step) -> Network:
        return Network(name, ADVERSARIAL, build, sample, loss)

    def moved(name: str, build: Callable[[], nn.Module], loss: Step = warped, **options: Any) -> Network:
        return Network(name, REGISTRATION, build, pair(1, 16, 16), loss, **options)

    small, large = (both(image(1, n, n), image(1, n, n)) for n in (16, 64))
    morph: Sequence[int] = (4, 8, 8, 8)
    return [
        gan("Critic", lambda: nets.Critic((1, 16, 16), (4, 8), (2, 2)), small, criticise),
        gan("Discriminator", lambda: nets.Discriminator((1, 16, 16), (4, 8), (2, 2)), small, discriminate),
        gan("Generator", lambda: nets.Generator((6,), (8, 4, 4), (8, 1), (2, 2)), image(6), deceive),
        gan("MultiScalePatchDiscriminator",
            lambda: nets.MultiScalePatchDiscriminator(2, 2, 2, 4, 1, minimum_size_im=64), large, several_scales),
        gan("PatchDiscriminator", lambda: nets.PatchDiscriminator(2, 4, 1, num_layers_d=2), large, patch_gan),
        gan("PatchDiscriminator, instance norm",
            lambda: nets.PatchDiscriminator(2, 4, 1, num_layers_d=2, norm="INSTANCE"), large, patch_gan),
        gan("SPADENet",
            lambda: nets.SPADENet(2, 1, 1, 3, [16, 16], [8, 8], z_dim=4, spade_intermediate_channels=8),
            layout_and(image(1, 16, 16), 3, 16, 16), painting),
        moved("GlobalNet", lambda: nets.GlobalNet([16, 16], 2, 2, 4, 2), dtype=torch.float32),
        moved("LocalNet", lambda: nets.LocalNet(2, 2, 4, (0, 1, 2), out_channels=2)),
        moved("RegUNet", lambda: nets.RegUNet(2, 2, 4, 2, out_channels=2)),
        moved("VoxelMorphUNet", lambda: nets.VoxelMorphUNet(2, 2, 2, morph, (4,))),
        moved("VoxelMorph",
              lambda: nets.VoxelMorph(nets.VoxelMorphUNet(2, 2, 2, morph, (4,)), integration_steps=3, spatial_dims=2),
              voxelmorph),
    ]  # fmt: skip


NETWORKS: tuple[Network, ...] = (
    *_segmentation(), *_classification(), *_regression(), *_autoencoders(), *_generative(), *_pairs()
)  # fmt: skip

STANDS_FOR: dict[str, tuple[str, ...]] = {
    "DenseNet121, 3D": ("DenseNet169", "DenseNet201", "DenseNet264"),
    "EfficientNetBN": ("EfficientNet",),
    "EfficientNetBNFeatures": ("EfficientNetEncoder",),
    "ResNetFeatures": ("ResNetEncoder",),
    "SENet154": ("SENet",),
    "SEResNet50": ("SEResNet101", "SEResNet152"),
    "SEResNext50": ("SEResNext101",),
    "DiNTS, instance": ("TopologyConstruction",),
    "Transchex": ("MultiModal", "BertPreTrainedModel"),
}
"""Classes that differ from that of a row in the number of layers, or are a base class of it."""
