"""What takes the place of batch normalisation: the accuracy that the choices give on scikit-learn's digits.

``python -m benchmarks.norms_digits [--seeds 3] [--write docs/norms.md]``

*From scratch*: a small residual network with each normalisation, trained with and without privacy. *Pretrained*: the network
is trained with batch normalisation on public images, digits that stand upside down; its accuracy on further such images once
the layers are replaced, before any training, and the accuracy on upright digits after private training from there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.digits import accuracy, digits, epoch
from benchmarks.common.process import quiet
from dpfix.instrument.batch_norm_calls import group_count
from dpfix.weights.folded import fold

TEST, PUBLIC, BATCH, EPSILON, DELTA, CLIP = 397, 700, 256, 3.0, 1e-4, 0.1
Norm = Callable[[int], nn.Module]
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(width_in, width, 3, width // width_in, 1, bias=False), norm(width), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width))
        self.short = nn.Identity()
        if width_in != width:
            self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, 2, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.short(x))


def network(norm: Norm) -> nn.Module:
    """A residual network of 16, 32 and 64 channels with 12 normalisations."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU(), Block(16, 16, norm), Block(16, 32, norm),
        Block(32, 32, norm), Block(32, 64, norm), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def groups(smallest: int, channels: int) -> nn.Module:
    return nn.GroupNorm(group_count(channels, smallest), channels)


FROM_SCRATCH: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "none": lambda _: nn.Identity(),
    "groups of 2 channels": partial(groups, 2),
    "groups of 4 channels": partial(groups, 4),
    "groups of 8 channels": partial(groups, 8),
    "groups of 16 channels": partial(groups, 16),
    "layer": partial(nn.GroupNorm, 1),
    "instance": partial(nn.InstanceNorm2d, affine=True),
}


def train(model: nn.Module, data: Data, epochs: int, lr: float, batch: int = 64) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        epoch(model, optimizer, DataLoader(TensorDataset(*data), batch_size=batch, shuffle=True, drop_last=True))


def train_privately(model: nn.Module, data: Data, epochs: int, lr: float, norm: str = "group") -> nn.Module:
    training = dpfix.make_private_safe_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        data_loader=DataLoader(TensorDataset(*data), batch_size=BATCH, shuffle=True), target_epsilon=EPSILON,
        target_delta=DELTA, epochs=epochs, max_grad_norm=CLIP, criterion=nn.CrossEntropyLoss(),
        grad_sample_mode="bookkeeping", norm=norm, checks=0.0,
    )  # fmt: skip
    private, optimizer, loader = training
    for _ in range(epochs):
        epoch(private, optimizer, loader)
    return model


# ------------------------------------------------------------------ pretrained


def batch_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.BatchNorm2d]]:
    return [(o, n, m) for o in model.modules() for n, m in o.named_children() if isinstance(m, nn.BatchNorm2d)]


def replaced(model: nn.Module, smallest: int, *, folded: bool) -> nn.Module:
    """A copy with group normalisations; ``smallest`` channels a group, 0 for a single group."""
    model = copy.deepcopy(model)
    for owner, name, layer in batch_norms(model):
        channels = layer.num_features
        count = group_count(channels, smallest) if smallest else 1
        if folded:
            fold(layer, count)
        new = nn.GroupNorm(count, channels, eps=layer.eps)
        new.weight, new.bias = layer.weight, layer.bias
        setattr(owner, name, new)
    return model


def calibrated(model: nn.Module, public: Tensor) -> nn.Module:
    """As folded; weight and bias of each layer in turn then fit its output on public images to the original's."""
    student, wanted = replaced(model, 16, folded=True), []
    teacher = copy.deepcopy(model).eval()
    for _, _, layer in batch_norms(teacher):
        layer.register_forward_hook(lambda m, i, out: wanted.append(out))

    def fit(layer: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        y, x = wanted.pop(0), F.group_norm(inputs[0], layer.num_groups, eps=layer.eps)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        my, mx = y.mean(dims), x.mean(dims)
        slope = ((y - my.view(shape)) * (x - mx.view(shape))).mean(dims) / x.var(dims)
        layer.weight.copy_(slope)
        layer.bias.copy_(my - slope * mx)
        return layer.forward(inputs[0])

    hooks = [m.register_forward_hook(fit) for m in student.modules() if isinstance(m, nn.GroupNorm)]
    with torch.no_grad():
        teacher(public)
        student(public)
    for hook in hooks:
        hook.remove()
    return student


def fixed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for _, _, layer in batch_norms(model):
        layer.eval()
    return model


def starts(model: nn.Module, public: Tensor) -> dict[str, nn.Module]:
    """What private training can begin with."""
    return {
        "fixed statistics (`eval()`)": fixed(model),
        'groups of 2 channels (`norm="group"`)': replaced(model, 2, folded=False),
        "groups of 16 channels": replaced(model, 16, folded=False),
        "folded, groups of 2 channels": replaced(model, 2, folded=True),
        "folded, groups of 4 channels": replaced(model, 4, folded=True),
        'folded, groups of 16 channels (`norm="folded"`)': replaced(model, 16, folded=True),
        "folded, one group": replaced(model, 0, folded=True),
        "folded, groups of 16, and fitted to 64 public images": calibrated(model, public[:64]),
    }


# ------------------------------------------------------------------ the page


def shares(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1.0, help="of private training")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    given = parser.parse_args()
    quiet()
    scratch: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in FROM_SCRATCH}
    after: dict[str, tuple[list[float], list[float]]] = {}
    original: list[float] = []
    for seed in range(given.seeds):
        x, y = digits(seed)
        test, private = (x[:TEST], y[:TEST]), (x[TEST:], y[TEST:])
        for name, norm in FROM_SCRATCH.items():
            torch.manual_seed(seed)
            model = network(norm)
            start = copy.deepcopy(model)
            train(model, private, given.epochs, 0.1)
            scratch[name][0].append(accuracy(model, *test))
            if name != "batch":
                trained = train_privately(start, private, given.epochs, given.lr)
                scratch[name][1].append(accuracy(trained, *test))
            print(name, *(shares(v) for v in scratch[name] if v), flush=True)
        split = TEST + PUBLIC
        public, held_out = ((x[a:b].flip(-1, -2), y[a:b]) for a, b in ((TEST, split), (0, TEST)))
        torch.manual_seed(seed)
        pretrained = network(nn.BatchNorm2d)
        train(pretrained, public, given.epochs, 0.1)
        original.append(accuracy(pretrained, *held_out))
        pretrained.train()
        for name, model in starts(pretrained, public[0]).items():
            at_start, at_end = after.setdefault(name, ([], []))
            modes = {m: m.training for m in model.modules()}
            at_start.append(accuracy(model, *held_out))
            for module, mode in modes.items():
                module.training = mode
            torch.manual_seed(seed)
            at_end.append(accuracy(train_privately(model, (x[split:], y[split:]), given.epochs, given.lr), *test))
            print(name, shares(at_start), shares(at_end), flush=True)
    lines = [
        f"{given.seeds} seeds, each with another split; mean (lowest to highest) accuracy on {TEST} images. {given.epochs} "
        f"epochs; with privacy: epsilon {EPSILON:g}, delta {DELTA:g}, expected batch size {BATCH}, clip norm {CLIP:g}, learning "
        f"rate {given.lr:g}.",
        "",
        f"From scratch, {1797 - TEST} images:",
        "",
        *tables.head("normalisation", "without privacy", "with privacy"),
        *(tables.row(name, shares(a), shares(b) if b else "not possible") for name, (a, b) in scratch.items()),
        "",
        f"Pretrained with batch normalisation on {PUBLIC} public images of digits upside down ({shares(original)} on further "
        f"ones), then trained with privacy on {1797 - TEST - PUBLIC} upright ones:",
        "",
        *tables.head("what takes its place", "public task, before training", "private task, after training"),
        *(tables.row(name, shares(a), shares(b)) for name, (a, b) in after.items()),
    ]
    print("\n".join(lines))
    if given.write:
        tables.write(given.write, lines)


if __name__ == "__main__":
    main()
