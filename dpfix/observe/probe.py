"""The probe: a few samples on which everything is tried before the first real step.

Shapes, dtypes and whole numbers (labels, masks, token ids) come from the dataset; other floating values are redrawn,
with zeros kept, since padding and empty regions are structure. None of it is stored, printed or released.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dpfix.errors import USER_CODE_ERRORS, LoaderError
from dpfix.instrument import pytree
from dpfix.layout.row_count import RowCounter
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder, Placeholder, user_collate
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
    """

    batch: Any
    singles: tuple[Any, ...]
    collate: Callable[[list[Any]], Any]
    items: tuple[Any, ...]
    unchanged: tuple[int | None, ...] = ()

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
        return replace(_collated(items, self.collate), unchanged=tuple(unchanged))

    def without(self, sample: int) -> Probe:
        """The probe with the sample of that number left out."""
        return _collated([item for i, item in enumerate(self.items) if i != sample], self.collate)


def _collated(items: list[Any], collate: Callable[[list[Any]], Any]) -> Probe:
    return Probe(collate(list(items)), tuple(collate([item]) for item in items), collate, tuple(items))


SCALED = 1
"""Number of the sample that :func:`provoked` scales (the last one of a smaller probe)."""

_PROVOKED = 3
"""Size of a harder probe: beside an empty and a rare sample, an ordinary one."""


def provoked(probe: Probe) -> tuple[Callable[[], Probe], ...]:
    """Probes that bring out what depends on the data: an empty mask, a rare label, an outlier.

    The first has them all; the others one each, for steps that cannot take some of them.

    Returns:
        Functions that make the changed probes, since a collate function may reject one: sample 0 with the smallest
        labels and empty masks, sample 1 with the largest labels and floating values 50 times as large. Labels
        come from the values that the probe holds at the same path; where it holds a single one, the next is tried too.
        Sample 2 stays as it is; further ones would show nothing new and are left out.
    """
    low, high = _extremes(probe.items)
    scaled = min(SCALED, len(probe) - 1)

    def blank(i: int, path: pytree.Path, leaf: Any) -> Any:
        return _filled(leaf, low[path]) if i == 0 and path in low else leaf

    def rare(i: int, path: pytree.Path, leaf: Any) -> Any:
        if i != 1 or path not in high:
            return leaf
        return _filled(leaf, high[path] + (high[path] == low[path]))

    def rarer(i: int, path: pytree.Path, leaf: Any) -> Any:
        return _filled(leaf, low[path] - 1) if i == 1 and path in low and low[path] == high[path] else leaf

    def outlier(i: int, path: pytree.Path, leaf: Any) -> Any:
        return leaf * 50 if i == scaled and path not in low and _is_floating(leaf) else leaf

    def everything(i: int, path: pytree.Path, leaf: Any) -> Any:
        return outlier(i, path, rare(i, path, blank(i, path, leaf)))

    changes = (everything, blank, rare, rarer, outlier)
    return tuple(partial(probe.changed, change, _PROVOKED) for change in changes)


def emptied(probe: Probe) -> Probe:
    """A sample of nothing but zeros (padding, background) and empty strings beside an ordinary one.

    Returns:
        Two samples; whole numbers of the first are the smallest that the probe holds at the same path.
    """
    low, _ = _extremes(probe.items)

    def empty(i: int, path: pytree.Path, leaf: Any) -> Any:
        if i:
            return leaf
        if isinstance(leaf, (str, bytes)):
            return type(leaf)()
        return _filled(leaf, low[path]) if path in low else leaf * 0 if _is_floating(leaf) else leaf

    return probe.changed(empty, 2)


def _is_floating(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return np.issubdtype(leaf.dtype, np.floating)
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _extremes(items: tuple[Any, ...]) -> tuple[dict[pytree.Path, Any], dict[pytree.Path, Any]]:
    """Smallest and largest value of every leaf that holds whole numbers (labels, masks, ids) in all samples."""
    low: dict[pytree.Path, Any] = {}
    high: dict[pytree.Path, Any] = {}
    mixed: set[pytree.Path] = set()
    for item in items:
        for path, leaf in pytree.leaves(item):
            if not isinstance(leaf, (int, np.ndarray, torch.Tensor)):
                continue
            values = torch.as_tensor(leaf).detach().as_subclass(torch.Tensor)
            values = values.to(torch.uint8) if values.dtype is torch.bool else values  # round() knows no booleans
            if values.is_complex() or not values.numel() or not bool((values == values.round()).all()):
                mixed.add(path)
                continue
            low[path] = min(low.get(path, values.min().item()), values.min().item())
            high[path] = max(high.get(path, values.max().item()), values.max().item())
    for path in mixed:
        low.pop(path, None)
        high.pop(path, None)
    return low, high


def _filled(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.full_like(leaf, value)
    if isinstance(leaf, np.ndarray):
        return np.full_like(leaf, value)
    return type(leaf)(value)


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
    chosen = [indices[order[i % len(indices)]] for i in range(max(2, min(samples, len(indices))))]
    collate = CollateOrPlaceholder(user_collate(loader), Placeholder(None), augmentation and augmentation.for_probe())
    try:
        items = collate.prepared([loader.dataset[i] for i in chosen])
        return redrawn(items, collate.collated)
    except USER_CODE_ERRORS as error:
        raise LoaderError(
            f"data_loader: reading {len(chosen)} samples of {type(loader.dataset).__name__} failed:",
            f"{type(error).__name__}: {error}. dpfix needs one batch to check the training step;",
            "make sure that dataset[i], the collate_fn"
            + (" and the transform of the augmentation work" if augmentation else " work")
            + " for any list of samples, also for a single one.",
            path="data_loader",
        ) from error


def redrawn(items: list[Any], collate: Callable[[list[Any]], Any]) -> Probe:
    """The probe of some samples, with new floating values."""
    generator = torch.Generator().manual_seed(_SEED)
    return _collated([_redraw(item, generator) for item in items], collate)


def _redraw(item: Any, generator: torch.Generator) -> Any:
    """The same sample with new floating values."""

    def redraw(_: pytree.Path, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
            values = _redraw_tensor(torch.from_numpy(np.ascontiguousarray(leaf)), generator)
            return values.numpy()
        if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.layout is torch.strided:
            return _redraw_tensor(leaf, generator)
        return leaf

    return pytree.map_leaves(redraw, item)


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
