"""Families of timm whose layers are subclasses of BatchNorm: the clipped sum of each against batches of one.

``python -m tests.end_to_end.timm_families [name ...]``, where timm is installed; the tests use subclasses of their own.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpfix

FAMILIES = (
    "mobilenetv3_small_100", "efficientnet_b0", "regnety_002", "ghostnet_100", "repvgg_a0", "densenet121", "resnetv2_50",
    "resnetv2_50d_gn",
)  # fmt: skip
TOLERANCE = 2e-3
_OPS = ("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
        "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward")  # fmt: skip


def build(name: str) -> Any:
    """A small network of a family, without what is drawn at random."""
    import timm

    try:
        return timm.create_model(name, num_classes=3, drop_rate=0.0, drop_path_rate=0.0)
    except TypeError:
        return timm.create_model(name, num_classes=3, drop_rate=0.0)


def clipped_sum(model: Any, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The sum of the gradients of single samples, clipped to 1, in double precision."""
    model = copy.deepcopy(model).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in trained]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]), trained)
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        total = [t + g * min(1.0, 1.0 / (norm + 1e-6)) for t, g in zip(total, grads, strict=True)]
    return total


def error_of(name: str) -> tuple[float, dpfix.PrivateTraining]:
    """The relative error of what one step releases, and the training."""
    torch.manual_seed(0)
    net = build(name)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    training = dpfix.make_private_safe(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), 1.0),
        data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        criterion=torch.nn.CrossEntropyLoss(),
        poisson_sampling=False,
        cache=False,
    )
    x, y = data[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = clipped_sum(dpfix.export_plain(net), x, y)
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    model, optimizer, loader = training
    x, y = next(iter(loader))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    after = [p.detach() for p in net.parameters() if p.requires_grad]
    moved = torch.cat([(a - b).flatten() * 4 for a, b in zip(before, after, strict=True)]).double()
    whole = torch.cat([t.flatten() for t in wanted])
    return float((moved - whole).norm() / whole.norm()), training


def main(names: list[str]) -> int:
    """Run the families and print a line for each.

    Returns:
        How many are wrong.
    """
    library = torch.library.Library("torchvision", "DEF")  # without its own operators torchvision does not import
    for name in _OPS:
        library.define(f"{name}(Tensor a) -> Tensor")
    wrong = 0
    for name in names or FAMILIES:
        began = time.process_time()
        try:
            error, training = error_of(name)
        except dpfix.DPFixError as refusal:
            print(f"{name}: refused: {refusal}", flush=True)
            wrong += 1
            continue
        changed = len(dpfix.changed_layers(training[0]))
        good = error < TOLERANCE
        wrong += not good
        spent = time.process_time() - began
        print(
            f"{name}: {'right' if good else 'WRONG'}, relative error {error:.1e}, {training.plan.engine}, "
            f"{changed} layers changed, {spent:.0f} s of CPU time",
            flush=True,
        )
    return wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
