"""The probe: a few samples on which everything is tried before the first real step.

Shapes, dtypes and whole numbers (labels, masks, token ids) come from the dataset; other floating values are redrawn,
with zeros kept, since padding and empty regions are structure. None of it is stored, printed or released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dpfix.errors import USER_CODE_ERRORS, LoaderError
from dpfix.instrument import pytree
from dpfix.layout.row_count import RowCounter
from dpfix.observe.held import LOOKED_AT, Held, look
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder, Placeholder, user_collate
from dpfix.sampling.people import people_of
from dpfix.sampling.rate import index_set

SAMPLES = 4
"""Number of samples in a probe, at most; as many as the script's batches have if those are smaller."""

_SEED = 20160623


@dataclass(frozen=True)
class Probe:
    """A few samples, as one batch and one by one.

    Attributes:
        batch: all samples, collated as the loader does it.
        singles: every sample alone, collated.
        collate: the loader's collate function.
        items: the samples themselves.
        unchanged: for every sample its number in the probe that this one was made from; ``None`` if it is another.
        held: what these samples, and some others of the dataset, hold.
    """

    batch: Any
    singles: tuple[Any, ...]
    collate: Callable[[list[Any]], Any]
    items: tuple[Any, ...]
    unchanged: tuple[int | None, ...] = ()
    held: Held = field(default_factory=Held)

    def __len__(self) -> int:
        return len(self.singles)

    def of_size(self, samples: int) -> Any:
        """A collated batch of so many samples, made by repeating those of the probe."""
        return self.collate(self._repeated(samples))

    def _repeated(self, samples: int) -> list[Any]:
        return [self.items[i % len(self.items)] for i in range(samples)]

    def counts(self, counter: RowCounter | None, samples: int | None = None) -> tuple[int, ...]:
        """Rows of every sample.

        Args:
            counter: how to tell them; ``None`` if all samples have the same number.
            samples: number of samples in a batch made by :meth:`of_size`; those of the probe itself if not given.

        Returns:
            The numbers; empty without a counter.
        """
        if counter is None:
            return ()
        return tuple(counter.count(item) for item in self._repeated(len(self.items) if samples is None else samples))

    def changed(self, change: Callable[[int, pytree.Path, Any], Any], samples: int) -> Probe:
        """A probe of changed samples.

        Args:
            change: ``(sample number, path, leaf) -> leaf``; the very same leaf if it stays.
            samples: how many of the first samples are taken.

        Returns:
            The new probe.
        """
        items, unchanged = [], []
        for i, item in enumerate(self.items[:samples]):
            new: list[bool] = []

            def leaf_of(path: pytree.Path, leaf: Any, i: int = i, new: list[bool] = new) -> Any:
                out = change(i, path, leaf)
                new.append(out is not leaf)
                return out

            items.append(pytree.map_leaves(leaf_of, item))
            unchanged.append(None if any(new) else i)
        return replace(_collated(items, self.collate), unchanged=tuple(unchanged), held=self.held)

    def without(self, sample: int) -> Probe:
        """The probe with the sample of that number left out."""
        return _collated([item for i, item in enumerate(self.items) if i != sample], self.collate)


def _collated(items: list[Any], collate: Callable[[list[Any]], Any]) -> Probe:
    return Probe(collate(list(items)), tuple(collate([item]) for item in items), collate, tuple(items))


def take(
    loader: DataLoader[Any], samples: int = SAMPLES, augmentation: AugmentationMultiplicity | None = None
) -> Probe:
    """Read a probe from a loader's dataset, without touching its sampler.

    Args:
        samples: number of samples; fewer if the dataset has fewer (at least two, by repetition).

    Returns:
        The probe.

    Raises:
        LoaderError: the dataset or the collate function fails.
    """
    indices = index_set(loader)
    # In a fixed random order: the first samples of a dataset sorted by class would all have the same label.
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(_SEED)).tolist()
    wanted, people = max(2, min(samples, len(indices))), people_of(loader)
    chosen = (
        [indices[order[i % len(indices)]] for i in range(wanted)] if people is None else people.for_probe(order, wanted)
    )
    collate = CollateOrPlaceholder(user_collate(loader), Placeholder(None), augmentation and augmentation.for_probe())
    try:
        items = collate.prepared([loader.dataset[i] for i in chosen])
        further = [indices[i] for i in order[len(chosen) : len(chosen) + LOOKED_AT]]
        held, items = look(items, (partial(_read, loader, collate, i) for i in further))
        return redrawn(items, collate.collated, held)
    except USER_CODE_ERRORS as error:
        raise LoaderError(
            f"data_loader: reading {len(chosen)} samples of {type(loader.dataset).__name__} failed:",
            f"{type(error).__name__}: {error}. dpfix needs one batch to check the training step;",
            "make sure that dataset[i], the collate_fn"
            + (" and the transform of the augmentation work" if augmentation else " work")
            + " for any list of samples, also for a single one.",
            path="data_loader",
        ) from error


def _read(loader: DataLoader[Any], collate: CollateOrPlaceholder, index: int) -> Any:
    return collate.prepared([loader.dataset[index]])[0]


def redrawn(items: Sequence[Any], collate: Callable[[list[Any]], Any], held: Held | None = None) -> Probe:
    """The probe of some samples, with new floating values."""
    held, generator = held or Held(), torch.Generator().manual_seed(_SEED)
    return replace(_collated([_redraw(item, held, generator) for item in items], collate), held=held)


def _redraw(item: Any, held: Held, generator: torch.Generator) -> Any:
    """The same sample with new floating values; a number that stands for a missing one stays, NaN does not."""

    def redraw(path: pytree.Path, leaf: Any) -> Any:
        missing = held.missing.get(path, ())
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
            values = _redraw_tensor(torch.from_numpy(np.ascontiguousarray(leaf)), missing, generator)
            return values.numpy()
        if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.layout is torch.strided:
            return _redraw_tensor(leaf, missing, generator)
        return leaf

    return pytree.map_leaves(redraw, item)


def _redraw_tensor(tensor: torch.Tensor, missing: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    values = tensor.detach().as_subclass(torch.Tensor)
    if values.numel() == 0 or bool((values == values.round()).all()):
        return tensor  # masks, labels and one-hot codes kept as floats
    uniform = bool(((values >= 0) & (values <= 1)).all())
    draw = torch.rand if uniform else torch.randn
    new = draw(values.shape, generator=generator, dtype=torch.float32).to(values)
    out = tensor.clone()
    with torch.no_grad():
        stays = values == 0
        for value in missing:
            stays |= values == value
        out.copy_(torch.where(stays, values, new))
    return out
