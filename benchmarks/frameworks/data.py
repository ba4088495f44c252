"""Data sets of the scripts: made up, always the same."""

from __future__ import annotations

from typing import Any

import torch


def images(samples: int = 512) -> Any:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 28, 28, generator=draw), i % 10) for i in range(samples)]


def volumes(samples: int = 64) -> Any:
    draw = torch.Generator().manual_seed(0)
    shape = (1, 32, 32)
    pairs = [(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw) > 0) for _ in range(samples)]
    return [{"image": image, "label": label.float()} for image, label in pairs]


def sentences(samples: int = 128, length: int = 32) -> Any:
    draw = torch.Generator().manual_seed(0)
    make = lambda i: torch.randint(5, 1000, (length,), generator=draw)  # noqa: E731
    return [
        {"input_ids": make(i), "attention_mask": torch.ones(length).long(), "labels": i % 2} for i in range(samples)
    ]
