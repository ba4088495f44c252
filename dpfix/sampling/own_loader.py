"""A loader that draws by itself (``poisson_sampling=False``) tells what it hands out; it stays the script's own object."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch.utils.data import DataLoader, Sampler

_KEY = "dpfix_deliveries"


class Deliveries:
    """What a loader of the script's own hands out.

    The loader becomes one of a subclass of the same name until :meth:`end`. Its copies are nobody's.

    Args:
        loader: the loader.
        look: calls its collate function, and looks at what it makes of samples.

    Attributes:
        at_delivery: called with every batch that the loop gets.
        most_times: how often a batch that was asked for had one index, at most.
        in_parts: whether the batches are handed out in parts, by a ``BatchMemoryManager``.
    """

    def __init__(self, loader: DataLoader[Any], look: Callable[..., Any]) -> None:
        self.at_delivery: Callable[[Any], None] = lambda batch: None
        self._loader, self._look = ref(loader), look
        self.most_times, self.in_parts = 1, False
        before: Deliveries | None = vars(loader).get(_KEY)
        if before is not None:
            before.end()
        self._class = type(loader)
        loader.__class__ = _telling_class(type(loader))
        vars(loader)[_KEY] = self

    def of(self, other: DataLoader[Any]) -> DataLoader[Any]:
        """A loader that hands out the same samples in parts tells it in the same way."""
        if type(other) is DataLoader:
            parts = Deliveries(other, self._look)
            parts.at_delivery = self.at_delivery
            self.in_parts = True
            whole: Any = other.batch_sampler  # makes the parts, of what its own sampler draws
            whole.sampler = Counted(whole.sampler, self)
        return other

    def end(self) -> None:
        """The training is over."""
        self.at_delivery = lambda batch: None
        loader = self._loader()
        if loader is not None and vars(loader).get(_KEY) is self:
            del vars(loader)[_KEY]
            loader.__class__ = self._class

    def counted(self, indices: Any) -> None:
        """A batch of these indices was asked for."""
        if isinstance(indices, (list, tuple)) and len(set(indices)) < len(indices):
            self.most_times = max(self.most_times, *Counter(indices).values())

    def collating(self, collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """The collate function, looked at."""
        return functools.partial(self._look, collate)


class Counted(Sampler[Any]):
    """A batch sampler whose batches are looked at before they are read."""

    def __init__(self, batches: Any, deliveries: Deliveries) -> None:
        self._batches, self._deliveries = batches, deliveries

    def __iter__(self) -> Iterator[Any]:
        for indices in self._batches:
            self._deliveries.counted(indices)
            yield indices

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)


def deliveries_of(loader: Any) -> Deliveries | None:
    """What a loader's batches are told to; ``None`` if they are told to nobody."""
    return vars(loader).get(_KEY)


@functools.cache
def _telling_class(cls: type[Any]) -> type[Any]:
    class Telling(cls):
        @property
        def _index_sampler(self) -> Any:
            batches, deliveries = super()._index_sampler, vars(self).get(_KEY)
            return batches if deliveries is None else Counted(batches, deliveries)

        def __iter__(self) -> Iterator[Any]:
            deliveries, collate = vars(self)[_KEY], self.collate_fn
            if collate is not None:
                self.collate_fn = deliveries.collating(collate)
            try:
                return _Told(super().__iter__(), deliveries)  # it takes the collate function with it
            finally:
                self.collate_fn = collate

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _copied, (cls, {name: value for name, value in vars(self).items() if name != _KEY})

    Telling.__name__, Telling.__qualname__, Telling.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Telling


def _copied(cls: type[Any], state: dict[str, Any]) -> Any:
    other: Any = object.__new__(cls)
    vars(other).update(state)
    return other


class _Told:
    """The iterator of a loader, which tells what it gives."""

    def __init__(self, batches: Iterator[Any], deliveries: Deliveries) -> None:
        self._batches, self._deliveries = batches, deliveries

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._deliveries.at_delivery(batch)
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
