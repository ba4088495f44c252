"""Where the time of a private step goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from dpfix.engines.bookkeeping.handle import BookkeepingHandle

PARTS = ("forward", "backward", "norms", "sums", "noise", "the rest")


class Clock:
    """Adds up the seconds of a step by part.

    Args:
        now: what tells the time.

    Attributes:
        seconds: by part.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self.seconds = now, dict[str, float]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done inside.

        Yields:
            Nothing.
        """
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted


def medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by part, over some steps."""
    return {name: statistics.median(one[name] for one in steps) for name in steps[0]}


def parts_of_step(training: Any, loss: Callable[[], Any], now: Callable[[], float]) -> dict[str, float]:
    """Seconds of every part of a private step that is not checked.

    Args:
        training: a private training whose first step was made.
        loss: calls its model.
        now: what tells the time.

    Returns:
        By the names in :data:`PARTS`; with another engine than book-keeping, norms are among the sums.
    """
    _, optimizer, _ = training
    clock, guard = Clock(now), optimizer.guard
    handle = guard.guarded.handle
    with ExitStack() as stack:
        for thing, method, name in (
            (guard, "clip", "clipping"),
            (optimizer, "add_noise", "noise"),
            *([(handle, "_measured", "norms")] if isinstance(handle, BookkeepingHandle) else []),
        ):
            stack.enter_context(mock.patch.object(thing, method, clock.around(getattr(thing, method), name)))
        optimizer.zero_grad()
        with clock.part("forward"):
            value = loss()
        with clock.part("backward"):
            value.backward()
        with clock.part("step"):
            optimizer.step()
    found = clock.seconds
    norms = found.get("norms", 0.0)
    rest = found["step"] - found["clipping"] - found["noise"]
    return {
        "forward": found["forward"], "backward": found["backward"], "norms": norms,
        "sums": found["clipping"] - norms, "noise": found["noise"], "the rest": rest,
    }  # fmt: skip
