"""What the objects of a script are, so that they can be made so again, wherever a call was interrupted.

Undoing step by step has a gap before and after every step, into which an interrupt or a lack of memory may fall. Here
everything that a call could change is written down before it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch
from torch.utils.data import DataLoader, Sampler

from dpfix.instrument.fixed_outside import IN_PLACE, end_all_but
from dpfix.instrument.module_state import copied, finished, same
from dpfix.instrument.rng import GeneratorStates

Undo = Callable[[], object]

_OBJECTS = (nn.Module, Optimizer, DataLoader, Sampler)
_OWN = ("dpfix", "opacus")
_NOT_ENTERED = frozenset({"dataset", "indices"})
"""Attributes of loaders and samplers that hold data."""


class Memento:
    """Modules, optimizers, loaders, private trainings, containers and tensors as they are now, and all that hangs on them.

    Of other objects (data sets, functions) nothing is written down.

    Args:
        *roots: where to begin.
        values: whether to copy the values of tensors in modules; without, only which tensors there are.
    """

    def __init__(self, *roots: Any, values: bool = True) -> None:
        self._generators = GeneratorStates.now()
        self._modes = Modes()
        self._values = [(t, copied(t)) for t in _tensors_of(roots)] if values else []
        self._undo: list[Undo] = []
        self._held: dict[int, Any] = {}  # an id is that of the thing only as long as it lives
        todo = deque[Any](roots)
        while todo:
            thing = todo.popleft()
            if id(thing) not in self._held:
                todo.extend(self._note(thing))

    def put_back(self) -> None:
        """Make everything again as it was; an interrupt in the middle of it does not keep it from being done."""
        try:
            self._put_back()
        except BaseException:
            self._put_back()
            raise

    def _put_back(self) -> None:
        self._modes.put_back()
        for undo in self._undo:
            undo()
        for tensor, value in self._values:
            if not same(tensor, value):
                tensor.data.copy_(value)
        self._generators.put_back()

    def _note(self, thing: Any) -> Iterable[Any]:
        """Write down how to undo changes of a thing.

        Returns:
            What hangs on it.
        """
        cls = type(thing)
        if isinstance(thing, torch.Tensor):
            if not thing.is_leaf:
                return ()
            self._keep(thing, _tensor(thing))
            return (thing.grad, *vars(thing).values())
        if isinstance(thing, torch.Generator):
            self._keep(thing, partial(thing.set_state, thing.get_state()))
            return ()
        if isinstance(thing, (MutableMapping, list, set, deque)):
            self._keep(thing, _container(thing))
            return [*thing.keys(), *thing.values()] if isinstance(thing, MutableMapping) else list(thing)
        if isinstance(thing, tuple):
            return thing
        if isinstance(thing, MethodType):
            return (thing.__self__,)
        if isinstance(thing, partial):
            return (thing.func, thing.args, thing.keywords)
        if isinstance(thing, _OBJECTS) or cls.__module__.partition(".")[0] in _OWN:
            attributes = getattr(thing, "__dict__", None)
            if isinstance(attributes, dict) and not isinstance(thing, type):
                self._keep(thing, _object(thing, cls, attributes))
                data = _NOT_ENTERED if isinstance(thing, (DataLoader, Sampler)) else ()
                return [value for name, value in attributes.items() if name not in data]
        return ()

    def _keep(self, thing: Any, undo: Undo) -> None:
        self._held[id(thing)] = thing
        self._undo.append(undo)


class Modes:
    """Whether gradients are on, the default precision, what torch runs functions under, and Python's and NumPy's generators.

    Torch runs functions and operations under modes, or none; while steps are compared, ``random`` has other functions.

    Python does not leave a ``with`` block that is interrupted in its last line, so that a state of torch's can stay behind.

    As a context manager it puts them back where an exception comes out of the block.
    """

    def __init__(self) -> None:
        self._gradients, self._dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        self._outside = tuple(IN_PLACE)
        self._looked_at = torch._C._get_torch_function_state()  # type: ignore[attr-defined]
        self._functions = _get_current_function_mode_stack()
        self._operations = dispatch._get_current_dispatch_mode_stack()

    def __enter__(self) -> None:
        """Nothing: they were written down before."""

    def __exit__(self, raised: Any, *rest: Any) -> None:
        if raised is not None:
            self.put_back()

    def put_back(self) -> None:
        """Make them again what they were."""
        end_all_but(self._outside)
        torch.set_grad_enabled(self._gradients)
        torch.set_default_dtype(self._dtype)
        torch._C._set_torch_function_state(self._looked_at)  # type: ignore[attr-defined]
        for now, before, pop, push in (
            (_get_current_function_mode_stack, self._functions, _pop_mode, _push_mode),
            (dispatch._get_current_dispatch_mode_stack, self._operations, dispatch._pop_mode, dispatch._push_mode),
        ):
            if _same_things(now(), before):
                continue
            for _ in now():
                pop()
            for mode in before:
                push(mode)


def _tensors_of(roots: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Parameters, buffers and attributes of the modules among some things, each once."""
    modules = {m: None for root in roots if finished(root) for m in root.modules()}
    found: dict[int, torch.Tensor] = {}
    for module in modules:
        attributes = vars(module)
        inside = [v for v in attributes.values() if isinstance(v, (list, dict))]
        held = [*attributes.values(), *(v for c in inside for v in (c.values() if isinstance(c, dict) else c))]
        found |= {id(t): t for t in held if isinstance(t, torch.Tensor)}
    for tensor in found.values():
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
        if not is_lazy(tensor) and not wrapped:
            yield tensor


def _same_things(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _object(thing: Any, cls: type, attributes: dict[str, Any]) -> Undo:
    refill = _container(attributes)

    def undo() -> None:
        if type(thing) is not cls:
            object.__setattr__(thing, "__class__", cls)
        refill()

    return undo


def _container(thing: Any) -> Undo:
    if isinstance(thing, MutableMapping):
        items = list((thing.copy() if type(thing) is dict else thing).items())

        def undo_mapping() -> None:
            if _same_things((x for pair in thing.items() for x in pair), (x for pair in items for x in pair)):
                return
            thing.clear()
            for key, value in items:
                thing[key] = value

        return undo_mapping
    content = list(thing)

    def undo() -> None:
        if not _same_things(thing, content):
            thing.clear()
            (thing.update if isinstance(thing, set) else thing.extend)(content)

    return undo


def _tensor(t: torch.Tensor) -> Undo:
    cls, data, trained, grad = type(t), t.data, t.requires_grad, t.grad
    hooks = [(name, getattr(t, name)) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    refill = [_container(vars(t)), *(_container(content) for _, content in hooks if content is not None)]

    def undo() -> None:
        lazy = is_lazy(t)
        if type(t) is not cls or (not lazy and (t.data_ptr() != data.data_ptr() or t.shape != data.shape)):
            t.data = data
            t.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]
        if t.requires_grad is not trained:
            t.requires_grad_(trained)
        if t.grad is not grad:
            t.grad = grad
        for name, content in hooks:
            if getattr(t, name) is not content:
                setattr(t, name, content)
        for again in refill:
            again()

    return undo
