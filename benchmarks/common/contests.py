"""The models whose private steps are measured: small ones, and those of real use by their libraries' own classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.models import classify

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contest:
    """A model, batches of its data, and the loop's training step.

    Attributes:
        model: builds the model.
        batch: a batch of so many samples.
        step: from model and batch to the loss.
        size: samples of a batch on the CPU.
        on_gpu: samples of a batch on a GPU; none where the model is measured on the CPU only.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    step: Callable[[nn.Module, Any], Tensor]
    size: int
    on_gpu: int | None = None


# ------------------------------------------------------------------ steps


def reconstruction(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[0], batch[0])


def tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def next_word(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten())


def classify_text(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits, batch[1])


def classify_image(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])


def translate(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0], labels=batch[1]).logits.flatten(0, 1), batch[1].flatten())


def denoise(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0], timesteps=batch[2]), batch[1])


def compare(model: nn.Module, batch: Any) -> Tensor:
    """Two views of every picture through one network."""
    return -F.cosine_similarity(model(batch[0]), model(batch[1])).mean()


# ------------------------------------------------------------------ batches


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape)


def vectors(size: int) -> Batch:
    return torch.randn(size, 784), labels(10, size)


def images(*shape: int, classes: int = 10) -> Callable[[int], Batch]:
    return lambda size: (torch.randn(size, *shape), labels(classes, size))


def volumes(side: int) -> Callable[[int], Batch]:
    return lambda size: (torch.randn(size, 1, side, side, side), labels(2, size, side, side, side))


def words(vocabulary: int, length: int) -> Callable[[int], Batch]:
    return lambda size: (labels(vocabulary, size, length), labels(vocabulary, size, length))


def texts(vocabulary: int, length: int) -> Callable[[int], Batch]:
    return lambda size: (labels(vocabulary, size, length), labels(2, size))


# ------------------------------------------------------------------ models of transformers, peft and MONAI


def _transformers(kind: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings)
        return getattr(transformers, f"{kind}{head}")(config)

    return build


GPT2 = _transformers("GPT2", "LMHeadModel", n_layer=6, n_embd=512, n_head=8, n_positions=128)
LLAMA = partial(
    _transformers, "Llama", "ForCausalLM", vocab_size=8000, num_hidden_layers=4, hidden_size=512, intermediate_size=1376,
    num_attention_heads=8, num_key_value_heads=2,
)  # fmt: skip


def lora() -> nn.Module:
    import peft

    return peft.get_peft_model(GPT2(), peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))  # type: ignore[arg-type]


def vit(width: int, heads: int) -> Callable[[], nn.Module]:
    return _transformers(
        "ViT", "ForImageClassification", hidden_size=width, num_attention_heads=heads, num_hidden_layers=12,
        intermediate_size=4 * width, num_labels=10,
    )  # fmt: skip


SWIN = _transformers("Swin", "ForImageClassification", num_labels=10)
CONVNEXT = _transformers(
    "ConvNext", "ForImageClassification", depths=[2, 2, 6, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10
)
RESNET18 = _transformers(
    "ResNet", "ForImageClassification", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512],
    embedding_size=64, num_labels=10,
)  # fmt: skip
T5 = _transformers("T5", "ForConditionalGeneration", vocab_size=32128, decoder_start_token_id=0)
DISTILBERT = _transformers("DistilBert", "ForSequenceClassification")


class RootViT(nn.Module):
    """A vision transformer whose root owns the class token and the positions, as most are written."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 16, side: int = 224) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(models.Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def efficientnet() -> nn.Module:
    from monai.networks.nets import EfficientNetBN

    return EfficientNetBN("efficientnet-b0", pretrained=False, num_classes=10)


def swin_unetr() -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=2, feature_size=12)


def unetr() -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(1, 2, (64, 64, 64), feature_size=8, hidden_size=192, mlp_dim=768, num_heads=6)


def diffusion() -> nn.Module:
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        2, 1, 1, channels=(32, 64, 64), attention_levels=(False, True, True), num_res_blocks=1, num_head_channels=16,
        norm_num_groups=16,
    )  # fmt: skip


def noisy(size: int) -> Batch:
    return torch.randn(size, 1, 32, 32), torch.randn(size, 1, 32, 32), labels(1000, size)


def two_views(size: int) -> Batch:
    return torch.randn(size, 3, 32, 32), torch.randn(size, 3, 32, 32)


# ------------------------------------------------------------------ the list

PICTURE = (3, 224, 224)
CONTESTS: dict[str, Contest] = {
    "MLP": Contest(models.mlp, vectors, classify, 256, 4096),
    "CNN": Contest(models.cnn, images(1, 28, 28), classify, 256, 2048),
    "transformer": Contest(models.Transformer, words(10_000, 128), tokens, 16, 64),
    "ResNet18-GN": Contest(models.ResNet18, images(3, 32, 32), classify, 32, 512),
    "UNet 3D": Contest(models.unet, volumes(32), classify, 4, 32),
    "VNet": Contest(models.vnet, volumes(32), classify, 2, 16),
    "AutoencoderKL": Contest(models.autoencoder, images(1, 64, 64), reconstruction, 4, 64),
    "char LSTM": Contest(models.CharLSTM, words(80, 64), tokens, 64, 512),
    "siamese ResNet18": Contest(models.ResNet18, two_views, compare, 16, 128),
    "GPT-2 6x512": Contest(GPT2, words(50_257, 128), next_word, 4, 32),
    "Llama 4x512": Contest(LLAMA(), words(8000, 128), next_word, 8, 64),
    "Llama 4x512, tied": Contest(LLAMA(tie_word_embeddings=True), words(8000, 128), next_word, 8, 64),
    "LoRA on GPT-2": Contest(lora, words(50_257, 128), next_word, 4, 32),
    "DistilBERT": Contest(DISTILBERT, texts(30_522, 128), classify_text, 8, 64),
    "T5-small": Contest(
        T5, lambda n: (labels(32_128, n, 64), labels(32_128, n, 32)), translate, 8, 64
    ),
    "ViT-Tiny": Contest(vit(192, 3), images(*PICTURE), classify_image, 8, 128),
    "ViT-Tiny, own tokens": Contest(RootViT, images(*PICTURE), classify, 8, 128),
    "ViT-S": Contest(vit(384, 6), images(*PICTURE), classify_image, 8, 128),
    "Swin-T": Contest(SWIN, images(*PICTURE), classify_image, 4, 64),
    "ConvNeXt-pico": Contest(CONVNEXT, images(*PICTURE), classify_image, 4, 64),
    "ResNet18 224": Contest(RESNET18, images(*PICTURE), classify_image, 8, 128),
    "EfficientNet-B0": Contest(efficientnet, images(*PICTURE), classify, 4, 64),
    "SwinUNETR": Contest(swin_unetr, volumes(64), classify, 1, 4),
    "UNETR": Contest(unetr, volumes(64), classify, 2, 8),
    "DiffusionModelUNet": Contest(diffusion, noisy, denoise, 16, 128),
}  # fmt: skip
LARGER = "UNet 3D, batch 16"
"""Measured by :mod:`benchmarks.augmentation_digits` only."""
CONTESTS[LARGER] = Contest(models.unet, volumes(32), classify, 16)
SCALING = tuple(f"CNN, batch {size}" for size in (8, 32, 128, 512))
CONTESTS |= {
    name: Contest(models.cnn, images(1, 28, 28), classify, size)
    for name, size in zip(SCALING, (8, 32, 128, 512), strict=True)
}
