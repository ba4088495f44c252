"""Augmentation multiplicity: several views of a sample whose gradients are averaged before they are clipped.

De, Berrada, Hayes, Smith and Balle, "Unlocking High-Accuracy Differentially Private Image Classification through
Scale", 2022, section 3.2, after Hoffer et al., "Augment Your Batch", 2020. The views of a sample count as that one sample
for clipping, for sampling and for accounting, so they cost time and no privacy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from dpfix.errors import ArgumentError
from dpfix.layout.row_count import UnitItems, is_rows


class AugmentationMultiplicity:
    """Several views of every sample that is drawn.

    The views are made where the loader reads its samples (in its workers), before they are collated: a batch of ``n``
    samples arrives in the loop as ``n * k`` rows, those of a sample next to each other.

    Args:
        transform: makes one view; called ``k`` times per sample with a copy of it, each time with new random numbers. It
            gets the whole item if that is a mapping or a single array (MONAI's dictionary transforms, ``Compose``), and
            the first entry of a tuple ``(image, label)`` (torchvision). If it returns a list (MONAI's random
            crops), every entry is a row.
        k: number of views.
        identity: whether the sample itself is one of the views.
        joint: call ``transform`` with the whole item even if that is a tuple, for transforms that change image and
            segmentation together.

    Raises:
        ArgumentError: ``transform`` cannot be called, or ``k`` is not a whole number of at least 1.
    """

    def __init__(
        self, transform: Callable[[Any], Any], k: int = 8, *, identity: bool = False, joint: bool = False
    ) -> None:
        if not callable(transform):
            raise ArgumentError(
                f"AugmentationMultiplicity: transform is {type(transform).__name__}, not a function of one sample.",
                help="Pass a callable, for example a torchvision or MONAI Compose.",
                path="transform",
            )
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"AugmentationMultiplicity: k={k!r} is not a whole number of at least 1.", path="k")
        self.transform, self.k, self.identity, self.joint = transform, k, identity, joint
        self._seeded: int | None = None

    def __repr__(self) -> str:
        return f"AugmentationMultiplicity({type(self.transform).__name__}, k={self.k}, identity={self.identity})"

    def views(self, item: Any) -> list[Any]:
        """The views of one sample.

        Args:
            item: what the dataset returns for an index, or the items of a person.

        Returns:
            Rows to be collated; ``k`` of them, or as many as the transform makes.
        """
        self._seed_worker()
        items = item if isinstance(item, UnitItems) else [item]
        rows = [row for one in items for row in (one if is_rows(one) else [one])]
        made = [list(rows)] if self.identity else []
        made += [[out for row in rows for out in self._view(copy.deepcopy(row))] for _ in range(self.k - len(made))]
        views = (row for view in made for row in view)
        return UnitItems(views) if isinstance(item, UnitItems) else list(views)

    def for_probe(self) -> AugmentationMultiplicity:
        """The same for a trial, which must not advance the random state that MONAI's transforms have of their own.

        Returns:
            A copy; itself if the transform draws from the global generators.
        """
        if not hasattr(self.transform, "set_random_state"):
            return self
        transform = copy.deepcopy(self.transform)
        return AugmentationMultiplicity(transform, self.k, identity=self.identity, joint=self.joint)

    def _view(self, row: Any) -> list[Any]:
        pair = isinstance(row, (tuple, list)) and not self.joint
        made = self.transform(row[0] if pair else row)
        if made is None:
            raise TypeError(f"the transform of AugmentationMultiplicity returned None for {type(row).__name__}")
        every = made if isinstance(made, list) and (pair or is_rows(made) or not isinstance(row, list)) else [made]
        if not pair:
            return every
        return [type(row)((one, *row[1:])) if type(row) in {tuple, list} else type(row)(one, *row[1:]) for one in every]

    def _seed_worker(self) -> None:
        """MONAI's transforms have random states of their own, which forked workers would share."""
        worker = get_worker_info()
        set_state = getattr(self.transform, "set_random_state", None)
        if worker is not None and set_state is not None and self._seeded != worker.seed:
            self._seeded = worker.seed
            set_state(seed=worker.seed % 2**32)
