"""Families of timm and torchvision, classifying small images."""

from __future__ import annotations

from typing import Any

import timm
import torchvision
from torch import nn

from benchmarks.zoo.families.losses import by_pixel, classify
from benchmarks.zoo.network import Network
from benchmarks.zoo.samples import image, masked

TIMM, TORCHVISION = "timm", "torchvision"


def _timm(name: str, size: int = 32, *, sized: bool = False, **options: Any) -> Network:
    def build() -> nn.Module:
        given: dict[str, Any] = {"num_classes": 3, **({"img_size": size} if sized else {}), **options}
        return timm.create_model(name, pretrained=False, **given)

    return Network(name, TIMM, build, image(3, size, size, classes=3), classify)


def _torchvision(name: str, size: int = 32, **options: Any) -> Network:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, num_classes=3, **options)

    return Network(name, TORCHVISION, build, image(3, size, size, classes=3), classify)


def _segmenting(name: str) -> Network:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)

    return Network(name, TORCHVISION, build, masked(3, 32, 32, classes=3), by_pixel)


_STAGES: dict[str, Any] = {"embed_dim": 24, "depths": (1, 1, 2, 1)}

NETWORKS: tuple[Network, ...] = (
    _timm("resnet18"),
    _timm("resnetv2_50"),
    _timm("resnetv2_50d_gn"),
    _timm("skresnet18"),
    _timm("densenet121"),
    _timm("efficientnet_b0"),
    _timm("mobilenetv3_small_100"),
    _timm("regnety_002"),
    _timm("ghostnet_100"),
    _timm("repvgg_a0"),
    _timm("hrnet_w18_small"),
    _timm("nf_regnet_b0"),
    _timm("convnext_atto"),
    _timm("convnextv2_atto"),
    _timm("vit_tiny_patch16_224", sized=True, depth=3),
    _timm("deit_tiny_distilled_patch16_224", sized=True, depth=3),
    _timm("swin_tiny_patch4_window7_224", sized=True, window_size=2, **_STAGES),
    _timm("swinv2_tiny_window8_256", 64, sized=True, num_heads=(1, 2, 4, 8), window_size=4, **_STAGES),
    _timm("beit_base_patch16_224", sized=True, embed_dim=48, depth=2, num_heads=4),
    _timm("eva02_tiny_patch14_224", 28, sized=True, depth=2),
    _timm("cait_xxs24_224", sized=True, depth=2),
    _timm("xcit_nano_12_p16_224", sized=True, depth=2),
    _timm("mixer_s32_224", 64, sized=True),
    _timm("resmlp_12_224", sized=True),
    _timm("gmlp_s16_224", sized=True),
    _timm("poolformer_s12"),
    _timm("pvt_v2_b0"),
    _timm("levit_128s", 64, sized=True),
    _timm("coat_tiny", sized=True),
    _timm("twins_pcpvt_small", sized=True),
    _timm("maxvit_pico_rw_256", 64, sized=True),
    _timm("edgenext_xx_small"),
    _timm("mobilevit_xxs", 64),
    _timm("sequencer2d_s", 64, sized=True, layers=(1, 1, 1, 1)),
    _timm("davit_tiny", embed_dims=(24, 48, 96, 192), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    _timm("tnt_s_legacy_patch16_224", sized=True, depth=2),
    _torchvision("googlenet", aux_logits=False, init_weights=False),
    _torchvision("mobilenet_v2"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("squeezenet1_1"),
    _segmenting("lraspp_mobilenet_v3_large"),
)
