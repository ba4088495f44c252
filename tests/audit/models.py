"""Hypothesis strategies for small models: every kind of layer, put together in ways nobody thought of.

A model is a stem, a few blocks and a head. Blocks keep the form of what they get (``[batch, features]``, ``[batch, time,
features]`` or ``[batch, channels, *spatial]``), so that any of them can follow any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4
SIZE = {1: 7, 2: 5, 3: 4}
TIME = 3
WORDS = 7
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Residual(nn.Module):
    """Adds its input, in place or not."""

    def __init__(self, inner: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.inner, self.inplace = inner, inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.inplace:
            out += x
            return out
        return out + x


class InPlaceArithmetic(nn.Module):
    """Overwrites the output of a layer by arithmetic."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out *= 1.5
        out[:, 0] += 0.1
        return out


class Twice(nn.Module):
    """Calls one module twice; under one name or under two."""

    def __init__(self, inner: nn.Module, *, two_names: bool) -> None:
        super().__init__()
        self.first = inner
        if two_names:
            self.second = inner
        self.two_names = two_names

    def forward(self, x: Tensor) -> Tensor:
        return (self.second if self.two_names else self.first)(torch.tanh(self.first(x)))


class WeightAgain(nn.Module):
    """Uses a layer's weight a second time, transposed, outside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(x)), self.inner.weight.t())


class Scaled(nn.Module):
    """Parameters of its own: one number, and one vector with a batch dimension of one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Positions(nn.Module):
    """Looks positions up once for the whole batch, with shape ``[1, time]`` or ``[time]``."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.places, self.flat = nn.Embedding(TIME, WIDTH), flat

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return x + self.places(places if self.flat else places[None])


class Attend(nn.Module):
    """Self-attention."""

    def __init__(self, *, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return x if self.attention.batch_first else x.transpose(0, 1)


class Recur(nn.Module):
    """A recurrent layer."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        if self.rnn.batch_first:
            return self.rnn(x)[0]
        return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)


class Cell(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        out = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)


class OverTime(nn.Module):
    """Applies a block for images of one dimension to a sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class LastFirst(nn.Module):
    """Applies a block for vectors to the channels of an image, as ConvNeXt does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Format(nn.Module):
    """Changes the memory format of an image."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=CHANNELS_LAST[self.dims])


class Folded(nn.Module):
    """Folds time into the batch for a block of vectors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Model(nn.Module):
    """Stem, blocks, mean over everything between batch and features, head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], features: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), nn.Linear(WIDTH, 3)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        others = [d for d in range(1, x.dim()) if d != self.features % x.dim()]
        return self.head(torch.tanh(x).mean(others) if others else x)


# ------------------------------------------------------------------ blocks


@st.composite
def convolutions(draw: st.DrawFn, dims: int, inputs: int = WIDTH) -> nn.Module:
    """A convolution of any padding, stride, dilation and number of groups."""
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if inputs % g == 0]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from([0, 1, "same", "valid", (1,) + (0,) * (dims - 1)]))
    kernel = draw(st.sampled_from([1, 2, 3, (2,) + (1,) * (dims - 1)]))
    # Small enough that the image never shrinks to nothing, whatever came before.
    large = padding in (0, "valid") or isinstance(padding, tuple)
    kernel = draw(st.sampled_from([1, 2])) if large and kernel == 3 else kernel
    dilation = draw(st.sampled_from([1, 2])) if padding == "same" or padding == 1 else 1
    stride = 1 if padding in ("same", "valid", 0) else draw(st.sampled_from([1, 2]))
    if mode == "reflect" and padding == "same" and dilation == 2:
        dilation = 1  # reflects more than there is in a small image
    return CONV[dims](
        inputs, WIDTH, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip


@st.composite
def transposed_convolutions(draw: st.DrawFn, dims: int) -> nn.Module:
    """A transposed convolution."""
    stride = draw(st.sampled_from([1, 2]))
    return TRANSPOSED[dims](
        WIDTH, WIDTH, draw(st.sampled_from([2, 3])), stride=stride,
        padding=draw(st.sampled_from([0, 1])) if stride == 2 else 0,
        output_padding=draw(st.sampled_from([0, 1])) if stride == 2 else 0,
        groups=draw(st.sampled_from([1, 2])), bias=draw(st.booleans()),
    )  # fmt: skip


def activations() -> st.SearchStrategy[nn.Module]:
    """Activations; some overwrite the output of the layer before."""
    return st.sampled_from([
        lambda: nn.ELU(inplace=True), lambda: nn.LeakyReLU(0.3, inplace=True), nn.SiLU, nn.Tanh, lambda: nn.PReLU(1),
    ]).map(lambda make: make())  # fmt: skip


def vector_layers() -> st.SearchStrategy[nn.Module]:
    """Layers over the last dimension."""
    return st.one_of(
        st.booleans().map(lambda bias: nn.Linear(WIDTH, WIDTH, bias=bias)),
        st.booleans().map(lambda bias: nn.LayerNorm(WIDTH, bias=bias)),
        st.builds(lambda: nn.RMSNorm(WIDTH)),
        st.builds(WeightAgain),
        st.builds(Scaled),
    )


def sequence_layers() -> st.SearchStrategy[nn.Module]:
    """Layers over ``[batch, time, features]``."""
    heads = st.sampled_from([1, 2])
    rnns = st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])
    cells = st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    return st.one_of(
        vector_layers(),
        st.builds(lambda h, f, b: Attend(batch_first=f, num_heads=h, bias=b), heads, st.booleans(), st.booleans()),
        st.builds(lambda h, f: Attend(batch_first=f, num_heads=h, add_bias_kv=True), heads, st.booleans()),
        st.builds(
            lambda h, first: nn.TransformerEncoderLayer(
                WIDTH, h, 6, dropout=0.0, batch_first=True, norm_first=first
            ),
            heads, st.booleans(),
        ),
        st.builds(lambda kind, first, n: Recur(kind(WIDTH, WIDTH, n, batch_first=first)), rnns, st.booleans(), heads),
        st.builds(lambda kind: Recur(kind(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)), rnns),
        st.builds(lambda kind: Cell(kind(WIDTH, WIDTH)), cells),
        st.builds(OverTime, convolutions(1).filter(keeps_time)),
        st.builds(Folded, vector_layers()),
        st.builds(lambda flat: Positions(flat=flat), st.booleans()),
    )  # fmt: skip


def keeps_time(conv: nn.Module) -> bool:
    """Whether a convolution leaves the length of a short sequence as it is."""
    with torch.no_grad():
        try:
            return conv(torch.zeros(1, WIDTH, TIME)).shape[-1] == TIME
        except RuntimeError:
            return False


def image_layers(dims: int) -> st.SearchStrategy[nn.Module]:
    """Layers over ``[batch, channels, *spatial]``."""
    layers: list[st.SearchStrategy[nn.Module]] = [
        convolutions(dims),
        convolutions(dims),
        transposed_convolutions(dims),
        st.sampled_from([1, 2, 4]).map(lambda groups: nn.GroupNorm(groups, WIDTH)),
        st.builds(lambda: INSTANCE_NORM[dims](WIDTH, affine=True)),
        st.builds(LastFirst, vector_layers()),
        st.builds(lambda: nn.PReLU(WIDTH)),
    ]
    if dims in CHANNELS_LAST:
        layers.append(st.builds(lambda conv: nn.Sequential(Format(dims), conv), convolutions(dims)))
    return st.one_of(layers)


def blocks(layers: Callable[[], st.SearchStrategy[nn.Module]], same: Callable[[nn.Module], bool]) -> Any:
    """A layer, alone or inside one of the ways to use it."""
    keeping = layers().filter(same)
    return st.one_of(
        layers(),
        st.builds(nn.Sequential, layers(), activations()),
        st.builds(lambda layer, inplace: Residual(layer, inplace=inplace), keeping, st.booleans()),
        st.builds(InPlaceArithmetic, layers()),
        st.builds(lambda layer, two: Twice(layer, two_names=two), keeping, st.booleans()),
    )


def keeps(*shape: int) -> Callable[[nn.Module], bool]:
    """Whether a layer leaves inputs of several sizes as they are."""

    def same(layer: nn.Module) -> bool:
        with torch.no_grad():
            for more in range(2):
                size = (shape[0], *(s + more for s in shape[1:])) if len(shape) > 2 else shape
                x = torch.zeros(2, *size)
                try:
                    if layer(x).shape != x.shape:
                        return False
                except (RuntimeError, ValueError):
                    return False
        return True

    return same


Example = tuple[nn.Module, list[tuple[Tensor, int]]]


def runs(example: Example) -> bool:
    """Whether the model can be trained on its samples at all (reflection needs a large enough image)."""
    model, items = example
    try:
        out = model(torch.stack([x for x, _ in items]))
        out.square().sum().backward()
    except (RuntimeError, ValueError):
        return False
    model.zero_grad()
    return bool(torch.isfinite(out).all())


@st.composite
def vectors(draw: st.DrawFn) -> Example:
    """A multi-layer perceptron."""
    body = draw(st.lists(blocks(vector_layers, keeps(WIDTH)), min_size=1, max_size=3))
    return Model(nn.Linear(5, WIDTH), body, -1), _items(draw, 5)


@st.composite
def sequences(draw: st.DrawFn) -> Example:
    """A model of sequences: of vectors or of words."""
    body = draw(st.lists(blocks(sequence_layers, keeps(TIME, WIDTH)), min_size=1, max_size=2))
    if draw(st.booleans()):
        return Model(nn.Linear(3, WIDTH), body, -1), _items(draw, TIME, 3)
    stem = nn.Embedding(WORDS, WIDTH, padding_idx=draw(st.sampled_from([None, 0])))
    return Model(stem, body, -1), _items(draw, TIME, words=True)


@st.composite
def images(draw: st.DrawFn) -> Example:
    """A convolutional network in one, two or three dimensions."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    shape = (SIZE[dims],) * dims
    body = draw(
        st.lists(blocks(lambda: image_layers(dims), keeps(WIDTH, *shape)), min_size=1, max_size=2 if dims == 3 else 3)
    )
    return Model(draw(convolutions(dims, inputs=2)), body, 1), _items(draw, 2, *shape)


def _items(draw: st.DrawFn, *shape: int, words: bool = False) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    if words:
        return [(torch.randint(0, WORDS, shape, generator=generator), i % 3) for i in range(4)]
    return [((0.5 + i) * torch.randn(shape, generator=generator, dtype=torch.float64), i % 3) for i in range(4)]


def _double(example: Example) -> Example:
    """In double precision, with weights that do not depend on what was drawn before."""
    model = example[0].double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.mean() + 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, example[1]


def models() -> st.SearchStrategy[Example]:
    """A model in double precision with four samples ``(x, y)``."""
    return st.one_of(vectors(), sequences(), images()).map(_double).filter(runs)
