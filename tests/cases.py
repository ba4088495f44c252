"""The models: one list, used by every test that has to hold for all of them.

A case is a factory of a model, its samples, the training step, and what dpfix is expected to do with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

from tests.reference import Step

SAMPLES = 6
DEVICE = os.environ.get("DPFIX_TEST_DEVICE", "cpu")
"""Where the models of the cases are; the loaders deliver on the CPU, as they do everywhere, and the steps move the batch."""


@dataclass(frozen=True)
class Case:
    """One model with everything that is needed to train it.

    Attributes:
        name: id of the test.
        model: builds the model.
        sample: builds one sample.
        step: the loop's training step.
        collate: the loader's collate function.
        repaired: the model that a repair is expected to leave, with the same parameter names; the model itself if none.
        unused: names of parameters that dpfix is expected to freeze.
        loss_reduction: of the step.
    """

    name: str
    model: Callable[[], nn.Module]
    sample: Callable[[], Any]
    step: Step
    collate: Callable[[list[Any]], Any] = default_collate
    repaired: Callable[[], nn.Module] | None = None
    unused: tuple[str, ...] = ()
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        if DEVICE != "cpu":
            object.__setattr__(self, "step", _moving(self.step))

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model as the user has it, always with the same weights."""
        return _seeded(self.model).to(DEVICE, dtype).train()

    def plain(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model whose gradients are expected, with the weights of :meth:`build`."""
        if self.repaired is None:
            return self.build(dtype)
        model = _seeded(self.repaired).to(DEVICE, dtype).train()
        model.load_state_dict(self.build(dtype).state_dict(), strict=False)
        return model

    def samples(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """The dataset."""
        torch.manual_seed(1)
        return [_cast(self.sample(), dtype) for _ in range(SAMPLES)]

    def loader(self, dtype: torch.dtype = torch.float64, **options: Any) -> DataLoader[Any]:
        """A loader that delivers all samples in one batch, in order."""
        options = {"batch_size": SAMPLES, "collate_fn": self.collate} | options
        return DataLoader(self.samples(dtype), **options)  # type: ignore[arg-type]

    def singles(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """Every sample as a batch of one."""
        return [self.collate([sample]) for sample in self.samples(dtype)]


def _seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def _moving(step: Step) -> Step:
    """A training step that moves its batch to the model's device first."""

    @wraps(step)
    def moving(model: nn.Module, batch: Any) -> Tensor:
        return step(model, tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, batch))

    return moving


# ------------------------------------------------------------------ samples and steps


def labelled(*shape: int, classes: int = 3) -> Callable[[], tuple[Tensor, Tensor]]:
    """Samples ``(x, y)`` with a class label."""
    return lambda: (torch.randn(shape), torch.randint(0, classes, ()))


def words(length: int = 5, vocabulary: int = 11) -> Callable[[], tuple[Tensor, Tensor]]:
    """Samples of word indices, some of them twice, with a class label."""
    return lambda: (torch.randint(0, vocabulary, (length,)), torch.randint(0, 3, ()))


def classify(model: nn.Module, batch: Any) -> Tensor:
    """The usual loop."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def classify_sum(model: nn.Module, batch: Any) -> Tensor:
    """The same with the other reduction."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="sum")


class Pooled(nn.Module):
    """A body, a mean over everything behind the channels, and a linear head."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).flatten(2).mean(2))


def conv(layer: Callable[[], nn.Module], channels: int, *size: int, name: str, **options: Any) -> Case:
    """A case around one convolution or normalisation with inputs of some size."""
    return Case(name, lambda: Pooled(layer(), channels), labelled(*size), classify, **options)


# ------------------------------------------------------------------ models


class Functional(nn.Module):
    """Uses a layer's weight directly, beside calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x).tanh(), self.first.weight.t(), self.first.bias))


class Bilinear(nn.Module):
    """A layer with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.flip(1))


class Lists(nn.Module):
    """Keeps its weights in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 6) / 3, torch.randn(6, 3) / 3])
        self.named = nn.ParameterDict({"bias": torch.zeros(3)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights[0]) @ self.weights[1] + self.named["bias"]


class ClassToken(nn.Module):
    """A parameter with a batch dimension of one, repeated for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.tensor(1.5))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head((self.mix(x).tanh() * self.scale).mean(1))


class Residual(nn.Module):
    """Adds in place, as ResNets do, and activates in place without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.inner(x.tanh())
        return self.head(F.relu_(x))


class Repeated(nn.Module):
    """Calls one layer several times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.head(x)


class Shared(nn.Module):
    """Holds one layer under three names and calls it under two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.stages = nn.ModuleList([self.encoder, nn.Sequential(self.encoder[0], nn.Tanh())])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages[1](self.encoder(x)))


class Outputs(nn.Module):
    """Returns a dictionary with a list inside, as segmentation models with deep supervision do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x).tanh()
        return {"logits": self.a(x), "deep": [self.b(x)], "size": len(x)}


def dict_step(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out["logits"], batch[1]) + 0.5 * F.cross_entropy(out["deep"][0], batch[1])


class KeywordsOnly(nn.Module):
    """Takes its inputs by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers, self.head = nn.Embedding(11, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, *, ids: Tensor, numbers: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.words(ids).mean(1) + scale * self.numbers(numbers)))


def keyword_sample() -> dict[str, Tensor]:
    return {
        "ids": torch.randint(0, 11, (5,)),
        "numbers": torch.randn(4),
        "labels": torch.randint(0, 3, ()),
    }


def keyword_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(ids=batch["ids"], numbers=batch["numbers"], scale=0.5)
    return F.cross_entropy(out, batch["labels"])


class OwnLoss(nn.Module):
    """Computes its loss itself, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.words(ids).tanh().mean(1))
        out = {"logits": logits}
        return out if labels is None else out | {"loss": F.cross_entropy(logits, labels)}


def own_loss_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


class TextModel(nn.Module):
    """Word and position embeddings; the positions are looked up once, with shape ``[1, length]``."""

    def __init__(self, *, tied: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.positions = nn.Embedding(5, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        return self.head(self.norm(self.words(ids) + self.positions(places)).tanh())


def next_word_step(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


class Attention(nn.Module):
    """Self-attention with several heads."""

    def __init__(self, *, batch_first: bool, heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(6, heads, batch_first=batch_first, **options)
        self.head = nn.Linear(6, 3)
        self.dim = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x if self.dim else x.transpose(0, 1))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(self.dim))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Encoded(nn.Module):
    """A transformer encoder with a head."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.encoder, self.head = encoder(norm_first), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer whose last output is classified."""

    def __init__(self, rnn: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0][:, -1])
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


def recurrent(name: str, kind: type[nn.RNNBase], width: int = 5, **options: Any) -> Case:
    options = {"batch_first": True} | options
    return Case(name, lambda: Recurrent(kind(4, 5, **options), width), labelled(3, 4), classify)


class Cells(nn.Module):
    """A recurrent cell in a Python loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class TimeMajor(nn.Module):
    """Takes and returns ``[time, batch, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def time_major_collate(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items])


def time_major_step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])[-1], batch[1])


class Folded(nn.Module):
    """Folds the frames of a video into the batch for its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.frame, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.frame(x.flatten(0, 1)).tanh().mean((2, 3))
        return self.head(frames.unflatten(0, x.shape[:2]).mean(1))


class Checkpointed(nn.Module):
    """Computes a block again in the backward pass instead of keeping its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False).tanh())


class Unused(nn.Module):
    """Has a layer that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Choosing(nn.Module):
    """Chooses a path by a sample's own value; without a Python branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean(1, keepdim=True) > 0, self.left(x), self.right(x))


class Spectral(nn.Module):
    """Filters in the frequency domain with a real parameter of two columns."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(5, 2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.filter), n=8))


def frozen_stem() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def normed(norm: Callable[[], nn.Module]) -> nn.Module:
    return Pooled(nn.Sequential(nn.Conv2d(2, 8, 3), norm()), 8)


class FixedNorm(Pooled):
    """Keeps its BatchNorm in evaluation mode, also after ``train()``."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)), 8)
        norm = self.body[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.requires_grad_(False)

    def train(self, mode: bool = True) -> FixedNorm:
        super().train(mode)
        self.body[1].eval()
        return self


def channels_last() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return Pooled(body, 4).to(memory_format=torch.channels_last)


def channels_last_step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0].to(memory_format=torch.channels_last)), batch[1])


def two_views_step(model: nn.Module, batch: Any) -> Tensor:
    a, b, _ = batch
    return (model(a) - model(b)).square().sum(1).mean()


def detached_view_step(model: nn.Module, batch: Any) -> Tensor:
    a, b, _ = batch
    return -F.cosine_similarity(model(a), model(b).detach()).mean()


def views_sample() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6), torch.randn(6), torch.zeros((), dtype=torch.long)


def embedding_bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 6), nn.Tanh(), nn.Linear(6, 3))


XY = labelled(6)

CASES: tuple[Case, ...] = (
    Case("linear", mlp, XY, classify),
    Case("linear-sum", mlp, XY, classify_sum, loss_reduction="sum"),
    Case("linear-no-bias", lambda: nn.Linear(6, 3, bias=False), XY, classify),
    Case(
        "linear-sequence",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        labelled(5, 4),
        classify,
    ),
    Case("bilinear", Bilinear, XY, classify),
    Case("frozen-layer", frozen_stem, XY, classify),
    conv(lambda: nn.Conv1d(2, 4, 3, padding=2, dilation=2, stride=2), 4, 2, 9, name="conv1d-dilated"),
    conv(lambda: nn.Conv1d(4, 4, 4, padding="same", groups=2), 4, 4, 9, name="conv1d-same"),
    conv(lambda: nn.Conv2d(2, 4, (3, 2), padding=(1, 0), stride=(2, 1)), 4, 2, 7, 6, name="conv2d-uneven"),
    conv(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 4, 2, 6, 6, name="conv2d-reflect"),
    conv(lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), 8, 4, 6, 6, name="conv2d-depthwise"),
    conv(lambda: nn.Conv3d(2, 4, 3, padding=1, stride=2), 4, 2, 5, 5, 5, name="conv3d"),
    conv(lambda: nn.Conv3d(4, 4, 2, dilation=2, groups=2), 4, 4, 5, 5, 5, name="conv3d-dilated-groups"),
    Case("channels-last", channels_last, labelled(4, 6, 6), channels_last_step),
    conv(lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), 4, 2, 5, name="transposed1d"),
    conv(lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2), 4, 4, 4, 4, name="transposed2d-groups"),
    conv(lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False), 4, 2, 3, 3, 3, name="transposed3d"),
    Case("group-norm", lambda: normed(lambda: nn.GroupNorm(4, 8)), labelled(2, 6, 6), classify),
    Case("instance-norm", lambda: normed(lambda: nn.InstanceNorm2d(8, affine=True)), labelled(2, 6, 6), classify),
    Case(
        "instance-norm-tracking",
        lambda: normed(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        labelled(2, 6, 6),
        classify,
        repaired=lambda: normed(lambda: nn.InstanceNorm2d(8, affine=True)),
    ),
    Case(
        "layer-norm",
        lambda: nn.Sequential(nn.LayerNorm((4, 6)), nn.Flatten(), nn.Linear(24, 3)),
        labelled(4, 6),
        classify,
    ),
    Case("rms-norm", lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)), XY, classify),
    Case(
        "batch-norm",
        lambda: normed(lambda: nn.BatchNorm2d(8)),
        labelled(2, 6, 6),
        classify,
        repaired=lambda: normed(lambda: nn.GroupNorm(4, 8)),
    ),
    Case("batch-norm-fixed", FixedNorm, labelled(2, 6, 6), classify),
    Case("prelu", lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3)), XY, classify),
    Case(
        "inplace-modules", lambda: nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Linear(8, 3)), XY, classify
    ),
    Case("embedding-padding", lambda: TextModel(padding_idx=0), words(), next_word_step),
    Case("embedding-tied", lambda: TextModel(tied=True), words(), next_word_step),
    Case("embedding-bag", embedding_bag, words(), classify),
    Case("attention", lambda: Attention(batch_first=True, heads=3), labelled(5, 4), classify),
    Case("attention-time-major", lambda: Attention(batch_first=False, bias=False), labelled(5, 4), classify),
    Case("attention-bias-kv", lambda: Attention(batch_first=True, add_bias_kv=True), labelled(5, 4), classify),
    Case("transformer", lambda: Encoded(norm_first=False), labelled(4, 6), classify),
    Case("transformer-norm-first", lambda: Encoded(norm_first=True), labelled(4, 6), classify),
    recurrent("lstm", nn.LSTM),
    recurrent("lstm-two-layers-both-ways", nn.LSTM, 10, num_layers=2, bidirectional=True),
    recurrent("lstm-projected", nn.LSTM, 2, proj_size=2, batch_first=False),
    recurrent("gru", nn.GRU, batch_first=False),
    recurrent("rnn", nn.RNN, num_layers=2),
    Case("lstm-cell", lambda: Cells(nn.LSTMCell(4, 5)), labelled(3, 4), classify),
    Case("gru-cell", lambda: Cells(nn.GRUCell(4, 5)), labelled(3, 4), classify),
    Case("residual-in-place", Residual, XY, classify),
    Case("repeated-layer", Repeated, XY, classify),
    Case("shared-module", Shared, XY, classify),
    Case("functional-weight", Functional, XY, classify),
    Case("parameter-list", Lists, XY, classify),
    Case("class-token", ClassToken, labelled(4, 6), classify),
    Case("dict-output", Outputs, XY, dict_step),
    Case("keywords-only", KeywordsOnly, keyword_sample, keyword_step),
    Case("own-loss", OwnLoss, lambda: dict(zip(("ids", "labels"), words()(), strict=True)), own_loss_step),
    Case("time-major", TimeMajor, labelled(3, 4), time_major_step, collate=time_major_collate),
    Case("folded-batch", Folded, labelled(3, 2, 5, 5), classify),
    Case("checkpointed", Checkpointed, XY, classify),
    Case("unused-layer", Unused, XY, classify, unused=("spare.weight", "spare.bias")),
    Case("choosing", Choosing, XY, classify),
    Case("spectral", Spectral, labelled(8), classify),
    Case("weight-norm", lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)), XY, classify),
    Case("two-views", mlp, views_sample, two_views_step),
    Case("detached-view", mlp, views_sample, detached_view_step),
)
"""Every model case; add one here and every property is tested for it."""

BY_NAME = {case.name: case for case in CASES}
