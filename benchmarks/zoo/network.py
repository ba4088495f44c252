"""What a row of the tables is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from benchmarks.common.libraries import Step
from benchmarks.zoo.samples import Sample


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        name: the class or family, and what is special about the configuration.
        task: heading in the table.
        build: builds the network.
        sample: draws one sample.
        loss: the training step.
        collate: how samples become a batch.
        dtype: the dtype in which the released sum is compared; float32 where the network takes no other.
        refusal: code of the finding for which dpfix has to refuse it.
        samples: size of the dataset, of which a third is drawn per step.
        heavy: why it is left out unless it is asked for by name, or empty.
    """

    name: str
    task: str
    build: Callable[[], nn.Module]
    sample: Sample
    loss: Step
    collate: Callable[[list[Any]], Any] = default_collate
    dtype: torch.dtype = torch.float64
    refusal: str = ""
    samples: int = 24
    heavy: str = ""
