"""What plain Opacus and dpfix do with the same small set-ups, measured side by side.

``python -m benchmarks.opacus_comparison [--only TEXT] [--write]``

Every set-up is a model, a few samples and a training step as a script would have them. Plain Opacus gets the
model after ``ModuleValidator.fix``. Noise is 0, so that what is released can be compared:

* *sensitivity*: how far leaving one sample out moves the released sum, as a multiple of the clip norm C.
  DP-SGD needs at most 1.
* *error*: distance of the released sum from the clipped sum of gradients taken one sample at a time with
  ordinary autograd, relative to that sum.

Both are the worst of several clip norms. The exit status is 1 if dpfix gets a set-up wrong, or refuses one that it has to train.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.nets import UNet, VNet
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, default_collate

import dpfix
from benchmarks.common import tables
from benchmarks.common.libraries import FAILURES, Made, with_dpfix, with_opacus
from benchmarks.common.models import classify
from benchmarks.common.released import Gradients, clipped_sum, distance, drawn_after, gradient, norm, released

CLIP_NORMS = (0.01, 0.1, 1.0, 10.0)
LR = 0.05
LARGEST_ERROR = 2e-3
"""Relative error in float32 that is still rounding."""


@dataclass
class Setup:
    """One script: a model, its samples, and how a batch becomes a loss.

    Attributes:
        model: the model.
        items: the samples.
        loss: the training step, ``(model, batch) -> loss``.
        loader: options of the data loader.
        arguments: further arguments of the call, the same for both.
        criterion: the criterion in ``loss``, where ``dpfix.PerSampleLoss`` is the cure for it.
    """

    model: nn.Module
    items: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    loader: dict[str, Any] = field(default_factory=lambda: {"batch_size": 4})
    arguments: dict[str, Any] = field(default_factory=dict)
    criterion: nn.Module | None = None

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """How samples become a batch."""
        return self.loader.get("collate_fn", default_collate)

    def cured(self) -> Setup:
        """The same set-up with the criterion applied to every sample alone."""
        assert self.criterion is not None
        return with_criterion(self.model, self.items, dpfix.PerSampleLoss(self.criterion))


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        text: for the table.
        right: whether the guarantee holds in what was measured.
        refused: whether dpfix refused it.
    """

    text: str
    right: bool
    refused: bool = False


def plain_opacus(setup: Setup, **arguments: Any) -> Made:
    """Opacus as its documentation has it: fix the model, build the optimizer, call make_private."""
    return with_opacus(ModuleValidator.fix(setup.model), *usual(setup), **options(setup, arguments))


def through_dpfix(setup: Setup, **arguments: Any) -> Made:
    """The same objects through dpfix."""
    return with_dpfix(setup.model, *usual(setup), setup.loss, **options(setup, arguments))


def usual(setup: Setup) -> tuple[DataLoader[Any], float]:
    """Loader and learning rate."""
    return DataLoader(setup.items, **setup.loader), LR  # type: ignore[arg-type]


def options(setup: Setup, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"noise_multiplier": 0.0, **setup.arguments, **arguments}


# ------------------------------------------------------------------ measuring


def released_sum(setup: Setup, made: Made, items: list[Any], clip_norm: float) -> Gradients:
    """The sum that the private optimizer would release for a batch of these samples."""
    mean = setup.arguments.get("loss_reduction", "mean") == "mean"
    return released(made.model, made.optimizer, setup.loss, setup.collate(items), clip_norm, mean=mean)


def batch_of_one(model: nn.Module, setup: Setup, clip_norm: float) -> Gradients:
    """The sum of clipped gradients, one sample at a time, with ordinary autograd."""
    return clipped_sum((gradient(model, setup.loss, setup.collate([item])) for item in setup.items), clip_norm)


def sensitivity(setup: Setup, made: Made, clip_norms: Sequence[float] = CLIP_NORMS) -> float:
    """How far leaving one sample out moves the released sum, as a multiple of the clip norm."""
    items = setup.items
    worst = 0.0
    for clip_norm in clip_norms:
        whole = released_sum(setup, made, items, clip_norm)
        for i in range(len(items)):
            rest = released_sum(setup, made, items[:i] + items[i + 1 :], clip_norm)
            worst = max(worst, distance(whole, rest) / clip_norm)
    return worst


def error(setup: Setup, made: Made) -> float:
    """Largest relative distance from the batch-of-one sum; ends the private training."""
    sums = [released_sum(setup, made, setup.items, clip_norm) for clip_norm in CLIP_NORMS]
    model = made.reference()
    wanted = [batch_of_one(model, setup, clip_norm) for clip_norm in CLIP_NORMS]
    return max(distance(a, b) / norm(b) for a, b in zip(sums, wanted, strict=True))


def released_sums(make: Callable[..., Made], setup: Setup, clip_norms: Sequence[float] = CLIP_NORMS) -> Outcome:
    """Sensitivity and, where a sample alone has a gradient, the error."""
    made = make(setup, poisson_sampling=False)
    bound = sensitivity(setup, made, clip_norms)
    try:
        wrong = error(setup, made)
    except ValueError:  # BatchNorm of a single value: there is no gradient of one sample
        wrong = float("nan")
    text = f"trains (`{made.engine}`): sensitivity {bound:.2f} C"
    text += "" if wrong != wrong else f", error {wrong:.0e}"
    return Outcome(text, right=bound <= 1 + 1e-3 and wrong <= LARGEST_ERROR)


def three_steps(make: Callable[..., Made], setup: Setup) -> Outcome:
    """Three Poisson steps with noise, then the released sums."""
    made = make(copy.deepcopy(setup), noise_multiplier=1.0)
    for _, batch in zip(range(3), made.loader, strict=False):
        made.optimizer.zero_grad()
        setup.loss(made.model, batch).backward()
        made.optimizer.step()
    return released_sums(make, setup)


def empty_draw(make: Callable[..., Made], setup: Setup) -> Outcome:
    """One step whose Poisson draw is empty."""
    made = make(setup, noise_multiplier=1.0)
    next(seed for seed in range(1000) if not drawn_after(made.loader, seed)[0])  # the loader is left at that seed
    batch = next(iter(made.loader))
    made.optimizer.zero_grad()
    setup.loss(made.model, batch).backward()
    made.optimizer.step()
    steps = sum(entry[-1] for entry in made.accountant.history)
    return Outcome(f"trains (`{made.engine}`): a step of noise alone, {steps} step accounted", right=steps == 1)


def draws(make: Callable[..., Made], setup: Setup) -> Outcome:
    """The rate that is accounted, and which samples are drawn."""
    made = make(setup, noise_multiplier=1.0)
    kept = getattr(setup.loader.get("sampler"), "indices", range(len(setup.items)))
    drawn = [i for _ in range(50) for batch in made.loader.batch_sampler for i in batch]
    outside = len(set(drawn) - set(kept))
    made.optimizer.zero_grad()
    setup.loss(made.model, next(iter(made.loader))).backward()
    made.optimizer.step()
    rate = made.accountant.history[-1][1]
    right_rate = setup.loader["batch_size"] / len(kept)
    held_out = len(setup.items) - len(kept)
    expected = made.optimizer.expected_batch_size
    text = f"rate {rate:.2f} (right: {right_rate:.2f}), expected batch size {expected:g}"
    text += f", draws {outside} of {held_out} held-out samples" if held_out else ""
    return Outcome(text, right=outside == 0 and abs(rate - right_rate) < 1e-9)


def same_function(make: Callable[..., Made], setup: Setup) -> Outcome:
    """Whether the prepared model still computes the function of the original."""
    x = setup.collate(setup.items)[0]
    with torch.no_grad():
        before = setup.model(x)
    made = make(setup, poisson_sampling=False)
    with torch.no_grad():
        after = made.model(x)
    gap = float((after - before).norm() / before.norm())
    wrong = error(setup, made)
    text = f"trains (`{made.engine}`): the output changes by {gap:.0%}, error {wrong:.0e}"
    return Outcome(text, right=gap < 1e-5 and wrong <= LARGEST_ERROR)


def scaled(make: Callable[..., Made], setup: Setup) -> Outcome:
    """One step through a GradScaler, compared with the same step without it."""
    made = make(setup, poisson_sampling=False)
    made.optimizer.max_grad_norm = 1e6
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.optimizer.zero_grad()
    scaler.scale(setup.loss(made.model, setup.collate(setup.items))).backward()
    scaler.step(made.optimizer)
    moved = norm({n: p.detach() - before[n] for n, p in made.model.named_parameters()})
    unscaled = norm(batch_of_one(made.reference(), setup, 1e6)) * LR / made.optimizer.expected_batch_size
    return Outcome(
        f"trains (`{made.engine}`): the step is {moved / unscaled:.0f} times as long",
        right=moved < 1.01 * unscaled,
    )


def keyword(make: Callable[..., Made], setup: Setup) -> Outcome:
    """Whether a misspelt keyword is noticed."""
    made = make(setup, posson_sampling=False)
    poisson = hasattr(made.loader.batch_sampler, "sample_rate")
    return Outcome(f"accepted, and Poisson sampling is {'on' if poisson else 'off'}", right=False)


# ------------------------------------------------------------------ the set-ups


def pairs(*shape: int, count: int = 8, classes: int = 3) -> list[tuple[Tensor, int]]:
    """Samples ``(x, y)`` of very different size, so that some are clipped and some are not."""
    return [(torch.randn(*shape) * (0.3 + i), i % classes) for i in range(count)]


class TwoLayers(nn.Module):
    """Two linear layers, written out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Centred(TwoLayers):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.relu(h - h.mean(0)))


class Residual(TwoLayers):
    """Adds its input in place."""

    def __init__(self) -> None:
        super().__init__(width=6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        out += x
        return self.b(torch.relu(out))


class Spare(TwoLayers):
    """Has a layer that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 2)


class TwoNames(TwoLayers):
    """Registers its layers a second time, as models with an encoder and a list of its stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([self.a, self.b])


class Tokens(nn.Module):
    """Scores for every token, ``[batch, classes, tokens]``."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x))).transpose(1, 2)


class Tied(nn.Module):
    """Uses the embedding's weight again for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.words(x)).mean(1), self.words.weight)


class Positions(nn.Module):
    """Looks the positions up once for the whole batch, as GPT-2 and BERT do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(11, 8), nn.Embedding(7, 8), nn.Linear(56, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.words(x) + self.places(torch.arange(x.shape[1])[None])).flatten(1))


class Attention(nn.Module):
    """Self-attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mha(x, x, x, need_weights=False)[0].mean(1))


def with_criterion(model: nn.Module, items: list[Any], criterion: nn.Module) -> Setup:
    """The usual step with a criterion object."""
    return Setup(model, items, lambda m, b: criterion(m(b[0]), b[1]), criterion=criterion)


def mlp(*middle: nn.Module) -> nn.Sequential:
    """Two linear layers and what stands between them."""
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def batch_norm() -> Setup:
    return Setup(mlp(nn.BatchNorm1d(8, affine=False)), pairs(6), classify)


def batch_mean() -> Setup:
    return Setup(Centred(), pairs(6), classify)


def words(length: int = 7) -> list[tuple[Tensor, int]]:
    """Token sequences with a class."""
    return [(torch.randint(1, 11, (length,)), i % 3) for i in range(8)]


def tokens() -> Setup:
    items = [(x, torch.randint(0, 5, (32,))) for x, _ in words(length=32)]
    for _, target in items[1:]:
        target[2:] = -100  # one long text among short ones

    return with_criterion(Tokens(), items, nn.CrossEntropyLoss(ignore_index=-100))


def class_weights() -> Setup:
    items = [(x, int(i == 0)) for i, (x, _) in enumerate(pairs(6))]  # one sample of the rare class
    return with_criterion(mlp(), items, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 50.0, 1.0])))


def batch_dice() -> Setup:
    masks = [(torch.rand(1, 8, 8) < (0.5 if i == 0 else 0.0)).float() for i in range(8)]
    items = [(torch.randn(1, 8, 8), mask) for mask in masks]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    return with_criterion(model, items, DiceLoss(sigmoid=True, batch=True))


def announced_mean() -> Setup:
    return Setup(mlp(), pairs(6), partial(classify, reduction="sum"))


def crops() -> Setup:
    def collate(items: list[Any]) -> Any:
        return default_collate([crop for item in items for crop in item])

    items = [[(torch.randn(6) * (0.3 + i), i % 3) for _ in range(4)] for i in range(6)]
    return Setup(mlp(), items, classify, {"batch_size": 3, "collate_fn": collate})


def circular() -> Setup:
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    return Setup(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)), pairs(2, 5, 5), classify)


def padding_row() -> Setup:
    items = [
        (torch.cat([torch.randint(1, 11, (7 - i % 5,)), torch.zeros(i % 5, dtype=torch.long)]), i % 3) for i in range(8)
    ]
    model = nn.Sequential(nn.Embedding(11, 8, padding_idx=0), nn.Flatten(), nn.Linear(56, 3))
    return Setup(model, items, classify)


def channels_last() -> Setup:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0].contiguous(memory_format=torch.channels_last)), batch[1])

    return Setup(model, pairs(2, 5, 5), loss)


def two_names() -> Setup:
    return Setup(TwoNames(), pairs(6), classify)


def tied() -> Setup:
    return Setup(Tied(), words(), classify)


def penalty() -> Setup:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return classify(model, batch) + sum((p.square().sum() for p in model.parameters()), torch.zeros(()))

    return Setup(mlp(), pairs(6), loss)


def in_place() -> Setup:
    return Setup(Residual(), pairs(6), classify)


def unused() -> Setup:
    return Setup(Spare(), pairs(6), classify)


def positions() -> Setup:
    return Setup(Positions(), words(), classify)


def detached() -> Setup:
    items = [(torch.randn(6) * (0.3 + i), torch.randn(6)) for i in range(8)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        z1, z2 = model(batch[0]), model(batch[1])
        return -F.cosine_similarity(z1, z2.detach(), dim=1).mean()

    return Setup(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), items, loss)


def vnet() -> Setup:
    items = [(torch.randn(1, 16, 16, 16), torch.randint(0, 2, (16, 16, 16))) for _ in range(3)]
    model = VNet(out_channels=2)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # so that the sums of different batches can be compared
    return Setup(model, items, classify, {"batch_size": 2})


def subset() -> Setup:
    options = {"batch_size": 4, "sampler": SubsetRandomSampler(list(range(16)))}
    return Setup(mlp(), pairs(6, count=32), classify, options)


def dropped_last() -> Setup:
    return Setup(mlp(), pairs(6, count=30), classify, {"batch_size": 16, "drop_last": True})


def empty_mapping() -> Setup:
    items = [{"image": torch.randn(6), "label": i % 3} for i in range(24)]
    options = {"batch_size": 2, "generator": torch.Generator()}
    return Setup(mlp(), items, lambda m, b: F.cross_entropy(m(b["image"]), b["label"]), options)


def empty_unet() -> Setup:
    items = [(torch.randn(1, 8, 8, 8), torch.randint(0, 2, (8, 8, 8))) for _ in range(24)]
    options = {"batch_size": 2, "generator": torch.Generator()}
    return Setup(UNet(3, 1, 2, (4, 8), (2,)), items, classify, options)


def attention() -> Setup:
    return Setup(Attention(), pairs(5, 8), classify)


def ordinary() -> Setup:
    return Setup(mlp(), pairs(6, count=24), classify)


Measure = Callable[[Callable[..., Made], Setup], Outcome]

TRAINS, REFUSED = False, True
SETUPS: tuple[tuple[str, Callable[[], Setup], Measure, bool], ...] = (
    ("`BatchNorm1d(affine=False)`", batch_norm, released_sums, TRAINS),
    ("`x - x.mean(0)` in forward", batch_mean, released_sums, REFUSED),
    ("mean over the tokens with `ignore_index`", tokens, released_sums, REFUSED),
    ("class weights and `reduction='mean'`", class_weights, released_sums, REFUSED),
    ("MONAI `DiceLoss(batch=True)`, most masks empty", batch_dice, released_sums, REFUSED),
    ("`reduction='sum'`, `loss_reduction='mean'`", announced_mean, released_sums, REFUSED),
    ("4 crops per item in one batch", crops, released_sums, TRAINS),
    ("`Conv2d(padding_mode='circular')`", circular, released_sums, TRAINS),
    ("`Embedding(padding_idx=0)`", padding_row, released_sums, TRAINS),
    ("`Conv2d` on channels-last images", channels_last, released_sums, TRAINS),
    ("layers registered under two names", two_names, released_sums, TRAINS),
    ("weight used again with `F.linear`", tied, released_sums, TRAINS),
    ("penalty on the weights in the loss", penalty, released_sums, REFUSED),
    ("`out += x` in forward", in_place, three_steps, TRAINS),
    ("parameter without gradient", unused, three_steps, TRAINS),
    ("position embedding called with `(1, T)`", positions, three_steps, TRAINS),
    ("`z2.detach()` in the loss (SimSiam)", detached, three_steps, TRAINS),
    ("MONAI `VNet`", vnet, three_steps, TRAINS),
    ("`SubsetRandomSampler`, 16 of 32", subset, draws, TRAINS),
    ("`drop_last=True`, 30 samples, batches of 16", dropped_last, draws, TRAINS),
    ("first Poisson draw empty, dict items", empty_mapping, empty_draw, TRAINS),
    ("Poisson draw empty, MONAI 3D `UNet`", empty_unet, empty_draw, TRAINS),
    ("`MultiheadAttention(8, 2, batch_first=True)`", attention, same_function, TRAINS),
    ("`torch.amp.GradScaler`, scale 1024", ordinary, scaled, REFUSED),
    ("misspelt keyword `posson_sampling=False`", ordinary, keyword, REFUSED),
)
"""Name, set-up, measurement, and what dpfix has to do with it."""


# ------------------------------------------------------------------ the table


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines between the rows."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def outcome(make: Callable[..., Made], build: Callable[[], Setup], measure: Measure) -> Outcome:
    """Measure one set-up with one library; a failure is an outcome too."""
    torch.manual_seed(0)
    setup = build()
    torch.manual_seed(1)
    with quiet():
        try:
            return measure(make, setup)
        except dpfix.DPFixError as refusal:
            code = str(refusal).partition(" ")[0]
            told = f" ({code})" if code.startswith("DPF") else ""
            told = f"refused: `{type(refusal).__name__}`{told}"
            if setup.criterion is None:
                return Outcome(told, right=True, refused=True)
            cured = measure(make, setup.cured())
            return Outcome(f"{told}. With `dpfix.PerSampleLoss`: {cured.text}", cured.right, refused=True)
        except FAILURES as failure:
            text = textwrap.shorten(str(failure).replace("|", "/"), 72, placeholder=" ...")
            return Outcome(f"stops: `{type(failure).__name__}`: {text}", right=False)


def run(only: str = "") -> tuple[list[str], bool]:
    """Measure the set-ups whose name contains a text.

    Args:
        only: the text.

    Returns:
        The lines of the table, and whether dpfix was right everywhere.
    """
    lines = tables.head("set-up", f"plain Opacus {metadata.version('opacus')}", "dpfix")
    right = True
    for name, build, measure, refused in SETUPS:
        if only not in name:
            continue
        opacus = outcome(plain_opacus, build, measure)
        ours = outcome(through_dpfix, build, measure)
        as_wanted = ours.right and ours.refused == refused
        right &= as_wanted
        silent = "" if opacus.right or opacus.text.startswith("stops") else "**silent** "
        lines.append(tables.row(name, silent + opacus.text, ("" if as_wanted else "**wrong** ") + ours.text))
        print(lines[-1], file=sys.stderr)
    return lines, right


PAGE = """\
# Plain Opacus and dpfix, side by side

This page is written by `make bench` (`python -m benchmarks.opacus_comparison --write`).
It was made with torch {torch} and opacus {opacus}, in float32 on a CPU.

Every row is one small script. Plain Opacus gets the model after `ModuleValidator.fix`.

- **Sensitivity**: how far leaving one sample out moves the released sum, as a multiple of the clip norm C.
  DP-SGD needs at most 1.
- **Error**: distance of the released sum from the clipped sum of gradients taken one sample at a time with
  ordinary autograd, relative to that sum.
- Both are the worst of the clip norms {norms}.
- **silent** marks a row in which plain Opacus raises nothing, although the figure shows that the guarantee
  or the gradient is not what it should be.
- The name in brackets is the engine that computed the per-sample gradients. dpfix times the ones that are
  right and takes the fastest, so another machine may show another name.
- `VNet` is measured with its dropout set to 0, so that sums of different batches can be compared.
- The three scripts in the README are measured in the same way by `python -m benchmarks.real_scripts`: at seven clip norms
  from 0.01 to 10, after a hundred steps of ordinary training, in which the gradients of samples come to point the same way.

{table}
"""


def write(lines: list[str]) -> None:
    """Put the table into the documentation and the README."""
    root = Path(__file__).parents[1]
    versions = {name: metadata.version(name).partition("+")[0] for name in ("torch", "opacus")}
    norms = ", ".join(f"{c:g}" for c in CLIP_NORMS)
    (root / "docs/comparison.md").write_text(PAGE.format(table="\n".join(lines), norms=norms, **versions))
    tables.write(root / "README.md", lines)


def main() -> int:
    """Print the table.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="only the set-ups whose name contains this text")
    parser.add_argument("--write", action="store_true", help="put the table into docs/comparison.md and README.md")
    given = parser.parse_args()
    lines, right = run(given.only)
    print("\n".join(lines))
    if given.write:
        write(lines)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
