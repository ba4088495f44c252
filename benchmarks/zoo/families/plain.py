"""Kinds of models without their packages: as diffusers, segmentation-models and graph packages have them, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.zoo.families.losses import by_pixel, classify
from benchmarks.zoo.network import Network
from benchmarks.zoo.samples import masked, noised

DIFFUSION, SEGMENTATION, GRAPHS, TABLES = (
    "diffusers-like",
    "segmentation-models-like",
    "graph networks",
    "tables and sets",
)

# ------------------------------------------------------------------ diffusion


def sinusoids(steps: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=steps.device) / (width // 2))
    angles = steps[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class Residual(nn.Module):
    """A residual block that the time step scales and shifts."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class CrossAttention(nn.Module):
    """Attention over pixels, then over words, as in a spatial transformer."""

    def __init__(self, channels: int, words: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, channels)
        self.own, self.other = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(words, 2 * channels, bias=False)
        self.query, self.out = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels)
        self.feed = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = map(self.split, self.own(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = map(self.split, self.other(words).chunk(2, -1))
        h = h + self.out(F.scaled_dot_product_attention(self.split(self.query(h)), k, v).transpose(1, 2).flatten(2))
        return x + (h + self.feed(h)).transpose(1, 2).unflatten(2, size)


class DiffusionUNet(nn.Module):
    """UNet2DConditionModel in small; ``checkpoint`` computes the blocks again in the backward pass."""

    def __init__(self, channels: int = 8, words: int = 12, time: int = 16, checkpoint: bool = False) -> None:
        super().__init__()
        self.checkpoint, self.width = checkpoint, channels
        self.time = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        self.words = nn.Embedding(20, words)
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.ModuleList([Residual(channels, channels, time), Residual(channels, 2 * channels, time)])
        self.halved = nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1)
        self.middle, self.attention = Residual(2 * channels, 2 * channels, time), CrossAttention(2 * channels, words)
        self.doubled = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.up = nn.ModuleList([Residual(4 * channels, channels, time), Residual(2 * channels, channels, time)])
        self.last = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def block(self, module: nn.Module, *args: Tensor) -> Tensor:
        if self.checkpoint:
            return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)  # type: ignore[return-value]
        return module(*args)

    def forward(self, x: Tensor, steps: Tensor, caption: Tensor) -> Tensor:
        t, words = self.time(sinusoids(steps, self.width).to(x.dtype)), self.words(caption)
        h = self.first(x)
        kept = [h := self.block(block, h, t) for block in self.down]
        h = self.attention(self.block(self.middle, self.halved(h), t), words)
        h = self.doubled(F.interpolate(h, scale_factor=2, mode="nearest"))
        for block in self.up:
            h = self.block(block, torch.cat([h, kept.pop()], 1), t)
        return self.last(h)


class AdaptiveBlock(nn.Module):
    """A block of DiT: layer norms without parameters, scaled and shifted by the condition."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.feed(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer: patches, learnt positions, classes and time steps as conditions."""

    def __init__(self, width: int = 16, size: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.first = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.time, self.classes = nn.Linear(width, width), nn.Embedding(21, width)
        self.blocks = nn.ModuleList([AdaptiveBlock(width) for _ in range(2)])
        self.last = nn.Linear(width, patch * patch)

    def forward(self, x: Tensor, steps: Tensor, caption: Tensor) -> Tensor:
        side = x.shape[-1] // self.patch
        h = self.first(x).flatten(2).transpose(1, 2) + self.positions
        c = self.time(sinusoids(steps, self.width).to(x.dtype)) + self.classes(caption[:, 0])
        for block in self.blocks:
            h = block(h, c)
        h = self.last(h).unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch))
        return h.permute(0, 1, 3, 2, 4).reshape(x.shape)


def captioned(g: Generator) -> tuple[Any, ...]:
    return *noised(1, 16, 16)(g), torch.randint(20, (5,), generator=g)


def denoise(model: nn.Module, batch: Any) -> Tensor:
    clean, noise, steps, caption = batch
    kept = torch.cos(steps.to(clean) / 1000 * math.pi / 2).reshape(-1, 1, 1, 1)
    return F.mse_loss(model(kept * clean + (1 - kept.square()).sqrt() * noise, steps, caption), noise)


# ------------------------------------------------------------------ segmentation


def unit(channels: int, out: int, size: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, padding=options.get("dilation", 1) * (size // 2), bias=False, **options),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """A pyramid of features."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24)) -> None:
        super().__init__()
        self.stages = nn.ModuleList([unit(a, b, stride=2) for a, b in zip((3, *widths), widths, strict=False)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := stage(x) for stage in self.stages]


class Attended(nn.Module):
    """Concurrent squeeze and excitation of channels and pixels (scSE)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, channels, 1),
            nn.Sigmoid(),
        )
        self.pixels = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channels(x) + x * self.pixels(x)


class UnetDecoder(nn.Module):
    """Unet with scSE in the decoder."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.up2, self.att2 = unit(24 + 16, 16), Attended(16)
        self.up1, self.att1 = unit(16 + 8, 8), Attended(8)
        self.head = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.encoder(x)
        h = self.att2(self.up2(torch.cat([F.interpolate(c, scale_factor=2.0, mode="nearest"), b], 1)))
        h = self.att1(self.up1(torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), a], 1)))
        return self.head(F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True))


class FPN(nn.Module):
    """A feature pyramid whose levels are merged by addition."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in (8, 16, 24)])
        self.smooth = nn.ModuleList([
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(inplace=True)) for _ in range(3)
        ])
        self.drop, self.head = nn.Dropout2d(0.2, inplace=True), nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [layer(f) for layer, f in zip(self.lateral, self.encoder(x), strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        merged = sum(
            F.interpolate(s(f), size=levels[0].shape[-2:], mode="bilinear")
            for s, f in zip(self.smooth, levels, strict=True)
        )
        return F.interpolate(self.head(self.drop(merged)), size=x.shape[-2:], mode="bilinear")


class ASPP(nn.Module):
    """DeepLab: dilated convolutions beside each other, and an image pooled to one pixel before its norm."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.branches = nn.ModuleList([unit(24, 16, 1), unit(24, 16, dilation=2), unit(24, 16, dilation=4)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), unit(24, 16, 1))
        self.project = nn.Sequential(unit(64, 16, 1), nn.Dropout(0.5))
        self.low, self.head = unit(8, 4, 1), nn.Conv2d(20, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        low, _, high = self.encoder(x)
        pooled = F.interpolate(self.pool(high), size=high.shape[-2:], mode="bilinear")
        h = self.project(torch.cat([*(b(high) for b in self.branches), pooled], 1))
        h = torch.cat([F.interpolate(h, size=low.shape[-2:], mode="bilinear"), self.low(low)], 1)
        return F.interpolate(self.head(h), size=x.shape[-2:], mode="bilinear")


class PSP(nn.Module):
    """Pyramid pooling."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(n), unit(24, 8, 1)) for n in (1, 2, 4)])
        self.head = nn.Sequential(unit(48, 16), nn.Conv2d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)[-1]
        h = torch.cat([h, *(F.interpolate(p(h), size=h.shape[-2:], mode="bilinear") for p in self.pools)], 1)
        return F.interpolate(self.head(h), size=x.shape[-2:], mode="bilinear")


class Linknet(nn.Module):
    """Transposed convolutions, skips that are added."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder()

        def up(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(
                unit(channels, 8, 1),
                nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
                unit(8, out, 1),
            )

        self.up = nn.ModuleList([up(24, 16), up(16, 8), up(8, 8)])
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.encoder(x)
        return self.head(self.up[2](self.up[1](self.up[0](c) + b) + a))


# ------------------------------------------------------------------ graphs

NODES, FEATURES = 9, 6


class DenseGCN(nn.Module):
    """Graphs padded to one size: adjacency matrices and a mask."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, width), nn.Linear(width, width)])
        self.eps = nn.Parameter(torch.zeros(2))
        self.norms, self.head = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(2)]), nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        for layer, norm, eps in zip(self.layers, self.norms, self.eps, strict=True):
            x = layer((1 + eps) * x + adjacency @ x)
            x = F.relu(norm(x.transpose(1, 2)).transpose(1, 2)) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class DenseGAT(nn.Module):
    """Attention over the neighbours."""

    def __init__(self, width: int = 8, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads, self.first = heads, nn.Linear(FEATURES, heads * width, bias=False)
        self.source, self.target = (nn.Parameter(0.3 * torch.randn(1, 1, heads, width)) for _ in range(2))
        self.bias, self.head = nn.Parameter(torch.zeros(heads * width)), nn.Linear(heads * width, classes)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x).unflatten(-1, (self.heads, -1))
        scores = F.leaky_relu((h * self.source).sum(-1)[:, :, None] + (h * self.target).sum(-1)[:, None], 0.2)
        scores = scores.masked_fill(adjacency[..., None] == 0, -1e9).softmax(2)
        h = torch.einsum("bijh,bjhc->bihc", scores, h).flatten(2) + self.bias
        return self.head((F.elu(h) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class MessagePassing(nn.Module):
    """Messages along a list of edges per graph, summed at their targets."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.first, self.message = nn.Linear(FEATURES, width), nn.Linear(2 * width, width)
        self.update, self.head = nn.GRUCell(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x)
        index = edges[..., None].expand(*edges.shape, h.shape[-1])
        for _ in range(2):
            source, target = h.gather(1, index[:, 0]), h.gather(1, index[:, 1])
            messages = F.relu(self.message(torch.cat([source, target], -1)))
            summed = torch.zeros_like(h).scatter_add(1, index[:, 1], messages)
            h = self.update(summed.flatten(0, 1), h.flatten(0, 1)).view_as(h)
        return self.head(h.mean(1))


class OneGraph(nn.Module):
    """All graphs of a batch as one, as torch_geometric makes of them: nodes in one row, edges with offsets."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.own, self.other, self.head = (
            nn.Linear(FEATURES, width),
            nn.Linear(FEATURES, width),
            nn.Linear(width, classes),
        )

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = F.relu(self.own(x).index_add(0, edges[1], self.other(x)[edges[0]]))
        count = int(graph.max()) + 1
        sums = h.new_zeros(count, h.shape[1]).index_add(0, graph, h)
        return self.head(sums / torch.bincount(graph, minlength=count)[:, None])


def padded_graph(g: Generator) -> tuple[Any, ...]:
    nodes = int(torch.randint(4, NODES + 1, (), generator=g))
    mask = (torch.arange(NODES) < nodes).float()
    a = (torch.rand(NODES, NODES, generator=g) < 0.4).float()
    a = ((a + a.T + torch.eye(NODES)) > 0).float() * mask * mask[:, None]
    return torch.randn(NODES, FEATURES, generator=g) * mask[:, None], a, mask, torch.randint(3, (), generator=g)


def listed_graph(g: Generator) -> tuple[Any, ...]:
    return (
        torch.randn(NODES, FEATURES, generator=g),
        torch.randint(NODES, (2, 20), generator=g),
        torch.randint(3, (), generator=g),
    )


def one_graph(items: list[Any]) -> tuple[Tensor, ...]:
    x, edges, y = zip(*items, strict=True)
    offsets = [NODES * i for i in range(len(items))]
    graph = torch.arange(len(items)).repeat_interleave(NODES)
    return torch.cat(x), torch.cat([e + o for e, o in zip(edges, offsets, strict=True)], 1), graph, torch.stack(y)


def classify_graph(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch[:-1]), batch[-1])


# ------------------------------------------------------------------ tables and sets


class Tabular(nn.Module):
    """FT-Transformer: a token for every column, and one for the class."""

    def __init__(self, numbers: int = 4, kinds: tuple[int, ...] = (5, 7), width: int = 16) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(0.3 * torch.randn(numbers, width)) for _ in range(2))
        self.tokens = nn.ModuleList([nn.Embedding(n, width) for n in kinds])
        self.cls = nn.Parameter(0.3 * torch.randn(width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        columns = x[..., None] * self.weight + self.bias
        categories = torch.stack([e(kinds[:, i]) for i, e in enumerate(self.tokens)], 1)
        h = torch.cat([self.cls.expand(len(x), 1, -1), columns, categories], 1)
        return self.head(self.encoder(h)[:, 0])


class CrossNet(nn.Module):
    """DCN and DLRM: embeddings of categories, and crosses of features."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(n, 8) for n in (5, 7)])
        self.kernels = nn.ParameterList([0.3 * torch.randn(width, 1) for _ in range(2)])
        self.offsets = nn.ParameterList([torch.zeros(width) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        first = h = torch.cat([x, *(t(kinds[:, i]) for i, t in enumerate(self.tables))], 1)
        for kernel, offset in zip(self.kernels, self.offsets, strict=True):
            h = first * (h @ kernel) + offset + h
        return self.head(h)


class PointNet(nn.Module):
    """Points, a shared perceptron as convolutions of width one, and the largest feature."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        )
        self.turn, self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 9)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(self.features(x).amax(2)).unflatten(1, (3, 3)) + torch.eye(3).to(x)
        return self.head(self.features(turn @ x).amax(2))


def columns(g: Generator) -> tuple[Any, ...]:
    return torch.randn(4, generator=g), torch.randint(5, (2,), generator=g), torch.randint(3, (), generator=g)


def points(g: Generator) -> tuple[Any, ...]:
    return torch.randn(3, 20, generator=g), torch.randint(3, (), generator=g)


NETWORKS: tuple[Network, ...] = (
    Network("UNet with conditions", DIFFUSION, DiffusionUNet, captioned, denoise),
    Network("UNet with conditions, checkpoints", DIFFUSION, lambda: DiffusionUNet(checkpoint=True), captioned, denoise),
    Network("DiT", DIFFUSION, DiT, captioned, denoise),
    Network("Unet, scSE", SEGMENTATION, UnetDecoder, masked(3, 32, 32, classes=3), by_pixel),
    Network("FPN", SEGMENTATION, FPN, masked(3, 32, 32, classes=3), by_pixel),
    Network("DeepLabV3+", SEGMENTATION, ASPP, masked(3, 32, 32, classes=3), by_pixel),
    Network("PSPNet", SEGMENTATION, PSP, masked(3, 32, 32, classes=3), by_pixel),
    Network("Linknet", SEGMENTATION, Linknet, masked(3, 32, 32, classes=3), by_pixel),
    Network("GIN, padded graphs", GRAPHS, DenseGCN, padded_graph, classify_graph),
    Network("GAT, padded graphs", GRAPHS, DenseGAT, padded_graph, classify_graph),
    Network("gated messages, lists of edges", GRAPHS, MessagePassing, listed_graph, classify_graph),
    Network("GraphConv, a batch as one graph", GRAPHS, OneGraph, listed_graph, classify_graph, one_graph),
    Network("FT-Transformer", TABLES, Tabular, columns, classify_graph),
    Network("DCN", TABLES, CrossNet, columns, classify_graph),
    Network("PointNet", TABLES, PointNet, points, classify),
)
