"""A model alone: the audit of a call on invented inputs, with a stand-in for the loss."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.cli.check.result import CheckResult, Status
from dpfix.cli.check.run import Located, Told
from dpfix.errors import USER_CODE_ERRORS, ArgumentError
from dpfix.instrument import pytree

SAMPLES = 8
"""Samples that are invented, at least."""


def check_model(target: str, shapes: Sequence[str], dtypes: Sequence[str]) -> CheckResult:
    """Look at a model.

    Args:
        target: ``module:factory``; the factory takes no arguments, and returns a model.
        shapes: of the arguments of the model, the first dimension that of the samples.
        dtypes: their types; float where there are fewer.

    Returns:
        What was found.

    Raises:
        ArgumentError: there is no such factory, it makes no model, or a shape or type cannot be read.
    """
    model, place = _made(target)
    inputs = [_invented(shape, dtypes[n] if n < len(dtypes) else "float") for n, shape in enumerate(shapes)]
    if len({len(x) for x in inputs}) > 1:
        raise ArgumentError(
            f"--input: the inputs {', '.join(shapes)} do not have the same number of samples.",
            help="The first dimension is that of the samples in all of them.",
            path="--input",
        )
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*inputs), batch_size=len(inputs[0]) // 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    report = dpfix.diagnose(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=loader,
        training_step=_stand_in,
    )
    told = Told(
        status="refused" if report.refusals else "enough",
        located=[Located(finding, *place) for finding in report.findings],
        training={"model": report.model, "engine": report.engine, "parameters": sum(p.numel() for p in trained)},
        report=asdict(report),
    )
    status = Status.REFUSED if report.refusals else Status.LOOKED_AT
    return CheckResult(Path(target), told, status)


def _stand_in(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean over the samples in which every output has a part."""
    out = [t for t in pytree.tensors(model(*batch)) if t.is_floating_point() and t.requires_grad]
    samples = len(batch[0])
    own = [t for t in out if t.dim() and len(t) == samples]
    return sum((t.reshape(samples, -1).float().square().mean(1).mean() for t in own), torch.zeros(()))


def _made(target: str) -> tuple[nn.Module, tuple[str, int]]:
    name, _, attribute = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(name), attribute)
        model = factory()
    except (ImportError, *USER_CODE_ERRORS) as error:
        raise ArgumentError(
            f"{target} makes no model: {type(error).__name__}: {error}",
            help="Name a function or class without arguments: package.module:make_model.",
            path="MODULE:FACTORY",
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{target} returns {type(model).__name__}, which is no nn.Module.",
            help="Return the model from the factory.",
            path="MODULE:FACTORY",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(
            f"{target} makes a model without trainable parameters.",
            help="Private training needs something to train.",
            path="MODULE:FACTORY",
        )
    code = getattr(getattr(factory, "__init__", None) if isinstance(factory, type) else factory, "__code__", None)
    return model, ("", 0) if code is None else (code.co_filename, code.co_firstlineno)


def _invented(shape: str, kind: str) -> torch.Tensor:
    dtype: Any = getattr(torch, kind, None)
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not isinstance(dtype, torch.dtype) or not sizes or min(sizes) < 1:
        raise ArgumentError(
            f"--input {shape} of type {kind}: it is no shape, or no type.",
            help="Pass --input 4,3,32,32, and --input-dtype long for indices.",
            path="--input",
        )
    sizes[0] = max(SAMPLES, 2 * sizes[0])
    draw = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=draw).to(dtype)
    return torch.randint(0, 2, sizes, generator=draw).to(dtype)
