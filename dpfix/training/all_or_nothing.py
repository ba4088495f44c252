"""A call that prepares a training happens as a whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dpfix.audit.persistent_state import modules_outside
from dpfix.instrument.freed_memory import give_back
from dpfix.instrument.memento import Memento
from dpfix.instrument.module_state import finished
from dpfix.instrument.turn import TURN
from dpfix.rules.distributed import refuse_flat
from dpfix.sampling.ranks import end_exchange
from dpfix.training.guards.optimizers import WATCHED
from dpfix.training.wrapped import on_wrapped
from dpfix.weights import origins

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def all_or_nothing(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Whatever stops a call (a refusal, ``KeyboardInterrupt``, a lack of memory), its arguments are as they were before.

    A private training that the model is in goes on. Calls and private steps of several threads come one after another. The
    call gets what is inside of a framework's wrappers (:mod:`dpfix.training.wrapped`).

    Args:
        call: takes keywords, among them ``module``, ``criterion`` and ``training_step``.

    Returns:
        The call.
    """
    on_inner = on_wrapped(call)

    @functools.wraps(call)
    def whole(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with TURN:
            module = kwargs.get("module")
            if finished(module):
                refuse_flat(module)
            beside = (kwargs.get("criterion"), kwargs.get("training_step"))
            outside = modules_outside(module, *beside) if finished(module) else []
            before = Memento(*kwargs.values(), *outside, *origins.REMEMBERED, WATCHED)
            try:
                made = on_inner(*args, **kwargs)
                give_back()
                end_exchange(module)  # last, since it cannot be undone
                return made
            except BaseException:
                before.put_back()
                raise

    return whole
