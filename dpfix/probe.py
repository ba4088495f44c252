"""The probe: a few samples on which everything is tried before the first real step.

Shapes, dtypes and integers come from the dataset; floating values are redrawn (zeros stay zero, since padding and
empty masks are structure), so nothing that is measured can tell a data value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dpfix import trees
from dpfix.errors import LoaderError
from dpfix.sampling import CollateOrStandIn, index_set

SAMPLES = 4
"""Number of samples in a probe."""


@dataclass(frozen=True)
class Probe:
    """A few samples, as one batch and one by one.

    Attributes:
        batch: all samples, collated as the loader does it.
        singles: every sample alone, collated.
        collate: the loader's collate function.
        items: the samples themselves.
    """

    batch: Any
    singles: tuple[Any, ...]
    collate: Callable[[list[Any]], Any]
    items: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.singles)

    def of_size(self, samples: int) -> Any:
        """A batch of any size, made by repeating the samples.

        Args:
            samples: number of samples.

        Returns:
            The collated batch.
        """
        return self.collate([self.items[i % len(self.items)] for i in range(samples)])


def take(loader: DataLoader[Any], samples: int = SAMPLES) -> Probe:
    """Read a probe from a loader's dataset, without touching its sampler.

    Args:
        loader: the user's loader.
        samples: number of samples; fewer if the dataset has fewer (at least two, by repetition).

    Returns:
        The probe.

    Raises:
        LoaderError: the dataset or the collate function fails.
    """
    indices = index_set(loader)
    chosen = [indices[i % len(indices)] for i in range(max(2, min(samples, len(indices))))]
    collate: Any = loader.collate_fn
    if isinstance(collate, CollateOrStandIn):
        collate = collate.collate
    generator = torch.Generator().manual_seed(20160623)
    try:
        items = tuple(_redraw(loader.dataset[i], generator) for i in chosen)
        batch = collate(list(items))
        singles = tuple(collate([item]) for item in items)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise LoaderError(
            f"data_loader: reading {len(chosen)} samples of {type(loader.dataset).__name__} failed: "
            f"{type(error).__name__}: {error}. dpfix needs one batch to check the training step; make sure that "
            "dataset[i] and the collate_fn work for any list of samples, also for a single one."
        ) from error
    return Probe(batch, singles, collate, items)


def _redraw(item: Any, generator: torch.Generator) -> Any:
    """The same sample with new floating values."""

    def redraw(_: trees.Path, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
            values = _redraw_tensor(torch.from_numpy(np.ascontiguousarray(leaf)), generator)
            return values.numpy()
        if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.layout is torch.strided:
            return _redraw_tensor(leaf, generator)
        return leaf

    return trees.map_leaves(redraw, item)


def _redraw_tensor(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = tensor.detach().as_subclass(torch.Tensor)
    if values.numel() == 0 or bool((values == values.round()).all()):
        return tensor  # masks, labels and one-hot codes kept as floats
    uniform = bool(((values >= 0) & (values <= 1)).all())
    draw = torch.rand if uniform else torch.randn
    new = draw(values.shape, generator=generator, dtype=torch.float32).to(values)
    out = tensor.clone()
    with torch.no_grad():
        out.copy_(torch.where(values == 0, torch.zeros_like(values), new))
    return out
