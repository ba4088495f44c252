"""The models of which time and memory are measured, and the usual training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def classify(model: nn.Module, batch: Any, **options: Any) -> Tensor:
    """The usual step."""
    return F.cross_entropy(model(batch[0]), batch[1], **options)


# ------------------------------------------------------------------ images as vectors, and small images


def mlp(width: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """A block of :class:`ResNet18`."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.c2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.GroupNorm(32, outside), nn.GroupNorm(32, outside)
        same = inside == outside and stride == 1
        down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(32, outside))
        self.down = nn.Identity() if same else down

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(y + self.down(x))


class ResNet18(nn.Sequential):
    """ResNet-18 for small images, with group norm."""

    def __init__(self) -> None:
        plan = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        super().__init__(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU(),
            *(Residual(*p) for p in plan), Residual(512, 512, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


# ------------------------------------------------------------------ texts


class Attention(nn.Module):
    """Self-attention of a :class:`Block`."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """A block of :class:`Transformer`."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.a, self.n1, self.n2 = Attention(width, heads, causal), nn.LayerNorm(width), nn.LayerNorm(width)
        self.m = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.n1(x))
        return x + self.m(self.n2(x))


class Transformer(nn.Module):
    """A language model, written out so that plain Opacus can train it."""

    def __init__(self, vocabulary: int = 10_000, width: int = 256, layers: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # positions with a batch dimension, which Opacus's engines need
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device).repeat(len(x), 1))
        return self.head(self.norm(self.blocks(x)))


class TorchTransformer(nn.Module):
    """A small language model of torch's own layers."""

    def __init__(self, width: int = 128, layers: int = 2, words: int = 1000, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device)[None])))


class CharLSTM(nn.Module):
    """An LSTM that predicts the next character at every place, or with ``classes`` the class of the whole text."""

    def __init__(self, vocabulary: int = 80, width: int = 64, hidden: int = 256, classes: int = 0) -> None:
        super().__init__()
        self.letters, self.rnn = nn.Embedding(vocabulary, width), nn.LSTM(width, hidden, batch_first=True)
        self.head, self.whole = nn.Linear(hidden, classes or vocabulary), classes > 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(self.letters(x))[0]
        return self.head(out[:, -1] if self.whole else out)


# ------------------------------------------------------------------ MONAI's networks


def unet(outputs: int = 2, channels: Sequence[int] = (16, 32, 64)) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, outputs, channels, (2,) * (len(channels) - 1), num_res_units=2)


def vnet() -> nn.Module:
    from monai.networks.nets import VNet

    return VNet(3, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


def autoencoder() -> nn.Module:
    from monai.networks.nets import AutoencoderKL

    return AutoencoderKL(
        2, 1, 1, num_res_blocks=(1, 1), channels=(32, 64), attention_levels=(False, True), latent_channels=3,
        norm_num_groups=16, with_encoder_nonlocal_attn=True, with_decoder_nonlocal_attn=True,
    )  # fmt: skip
