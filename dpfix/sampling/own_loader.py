"""A loader that draws by itself (``poisson_sampling=False``) tells what it hands out; it stays the script's own object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch.utils.data import DataLoader

_KEY = "dpfix_deliveries"


class Deliveries:
    """What a loader of the script's own hands out.

    The loader becomes one of a subclass of the same name until :meth:`end`. Its copies are nobody's.

    Args:
        loader: the loader.
        look: calls its collate function, and looks at what it makes of samples.

    Attributes:
        at_delivery: called with every batch that the loop gets.
    """

    def __init__(self, loader: DataLoader[Any], look: Callable[..., Any]) -> None:
        self.at_delivery: Callable[[Any], None] = lambda batch: None
        self._loader, self._look = ref(loader), look
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
        return other

    def end(self) -> None:
        """The training is over."""
        self.at_delivery = lambda batch: None
        loader = self._loader()
        if loader is not None and vars(loader).get(_KEY) is self:
            del vars(loader)[_KEY]
            loader.__class__ = self._class

    def collating(self, collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """The collate function, looked at."""
        return functools.partial(self._look, collate)


def deliveries_of(loader: Any) -> Deliveries | None:
    """What a loader's batches are told to; ``None`` if they are told to nobody."""
    return vars(loader).get(_KEY)


@functools.cache
def _telling_class(cls: type[Any]) -> type[Any]:
    class Telling(cls):
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
