"""Writing down what happens inside one training step: module calls, detach, in-place writes, uses of parameters."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from dpfix.instrument import pytree
from dpfix.instrument.call_sites import CallCounter, CallSite
from dpfix.instrument.in_place import is_in_place
from dpfix.instrument.module_state import tensors_held
from dpfix.instrument.parameter_uses import ParameterUses, arguments, made, result
from dpfix.instrument.source import calling_line
from dpfix.observe import double_activation
from dpfix.report.finding import Finding

_CUTS = frozenset({"detach", "detach_"})


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module.

    Attributes:
        args: positional arguments, tensors detached.
        kwargs: keyword arguments, tensors detached.
        output: what it returned, tensors detached.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Site:
    """A line of the user's code.

    Attributes:
        module: path of the module that was being called; empty outside the model (the loss function).
        line: ``file:line``.
        what: the operation.
    """

    module: str
    line: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} at {self.line}" + (f" in `{self.module}`" if self.module else "")


@dataclass(frozen=True)
class Returned:
    """A module call that has returned.

    Attributes:
        path: path of the module.
        shapes: shapes of the output tensors.
        site: which call of the step it is; ``None`` under ``no_grad``.
        carries_graph: whether an output requires gradient.
        entered: moment of the call.
        left: moment of the return; a call inside another one lies between its moments.
    """

    path: str
    shapes: tuple[tuple[int, ...], ...]
    site: CallSite | None
    carries_graph: bool
    entered: int
    left: int


@dataclass
class StepLog:
    """What a recorder has written down so far.

    Attributes:
        details: whether functions (detach, in-place, uses of parameters) are watched, and which outputs gradient reaches.
        layers: whether the calls of the modules inside are written down; if not, those of the model alone.
        one_row: number of samples. Inside the model a tensor with so many rows has one for each, and its shape tells all about
            it: its values are not kept. 0 to keep all values.
        calls: calls of the kept modules, by path.
        order: every module call, in the order in which they returned.
        reached: numbers (in ``order``) of the calls whose output a gradient reached.
        detached: where a graph was cut, and the numbers of the calls that the cut tensor comes from.
        in_place: where the output of a module was overwritten.
        functional: parameters used while their own module was not being called, with the first line.
        elsewhere: the modules that were being called then, by parameter.
        needs_workarounds: whether forward does what ``vmap`` does wrong or refuses: it writes into a tensor without a
            graph, looks up a padding token, or attends with a mask that gradient passes through.
        activations: calls of activations.
        stack: paths of the modules being called.
        failed: path of the innermost module whose forward raised; ``None`` if none did.
    """

    details: bool = False
    layers: bool = False
    one_row: int = 0
    calls: dict[str, list[RecordedCall]] = field(default_factory=dict)
    order: list[Returned] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    detached: dict[Site, set[int]] = field(default_factory=dict)
    in_place: dict[Site, None] = field(default_factory=dict)
    functional: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, None]] = field(default_factory=dict)
    needs_workarounds: bool = False
    activations: double_activation.Calls = field(default_factory=double_activation.Calls)
    stack: list[str] = field(default_factory=list)
    failed: str | None = None
    _clock: int = 0
    _open: list[tuple[int, CallSite | None]] = field(default_factory=list)
    _counter: CallCounter = field(default_factory=CallCounter)

    def forget(self) -> None:
        """Begin anew."""
        vars(self).update(vars(StepLog(self.details, self.layers, self.one_row)))

    def kept(self, _: pytree.Path, leaf: Any) -> Any:
        """What is kept of a tensor inside the model: without values it is on the device ``meta``."""
        told = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and 0 < leaf.shape[0] == self.one_row
        return _shape_only(leaf) if told else _detached(_, leaf)

    def entered(self, path: str) -> None:
        """The module at a path is being called."""
        self._clock += 1
        self._open.append((self._clock, self._counter.site(path) if torch.is_grad_enabled() else None))

    def returned(self, path: str, output: Any) -> int:
        """The module at a path has returned.

        Returns:
            The number of the call.
        """
        entered, site = self._open.pop() if self._open else (0, None)
        self._clock += 1
        shapes = tuple(tuple(t.shape) for t in pytree.tensors(output))
        self.order.append(Returned(path, shapes, site, bool(pytree.gradient_tensors(output)), entered, self._clock))
        return len(self.order) - 1


_FROM_EARLIER: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
"""What steps have made of constants alone, by id, for as long as somebody else (a cache of the model's code) holds it."""


class _Uses(ParameterUses):
    """Writes down the calls of functions on parameters, and on what is made of parameters and constants alone.

    Args:
        constants: the tensors that the model holds before the step.
    """

    def __init__(self, log: StepLog, names: dict[int, str], constants: Iterable[torch.Tensor]) -> None:
        super().__init__(names)
        self.log = log
        self._constants = {id(t): t for t in constants}

    @override
    def used(self, use: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        constant = all(self.named(t) or self._constant(t) for t in arguments(args, kwargs))
        use = made(use) if constant else use
        output = func(*args, **kwargs)
        found = result(func, args, output)
        if pytree.gradient_tensors(found):
            kept = _alike_everywhere if constant else self.log.kept
            call = RecordedCall(*(pytree.map_leaves(kept, part) for part in (args, kwargs, found)))
            self.log.calls.setdefault(use, []).append(call)
            if constant:
                self.name(found, use)
        return output

    @override
    def unused(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor) and all(map(self._constant, arguments(args, kwargs))):
            self._constants[id(output)] = _FROM_EARLIER[id(output)] = output
        return output

    def _constant(self, t: torch.Tensor) -> bool:
        return id(t) in self._constants or id(t) in _FROM_EARLIER


class _Watch(TorchFunctionMode):
    """Sees every torch function that Python calls."""

    def __init__(self, log: StepLog, owners: dict[int, tuple[str, frozenset[str]]]) -> None:
        super().__init__()
        self.log = log
        self.owners = owners
        self.outputs: dict[int, torch.Tensor] = {}
        self.nodes: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CUTS or (name == "__get__" and func == torch.Tensor.data.__get__):  # type: ignore[attr-defined]
            self._cut(args, "detach" if name in _CUTS else ".data")
        elif args and is_in_place(name, kwargs):
            self._overwritten(args[0], name)
            self._written_into(args[0], args[1:], kwargs)
        elif func is F.embedding:
            self._looked_up(*args, **kwargs)
        elif func is torch.embedding or (func is F.scaled_dot_product_attention and _learns_mask(*args, **kwargs)):
            self.log.needs_workarounds = True
        output = self._run(name, lambda: func(*args, **kwargs))
        if pytree.gradient_tensors(output):  # asking a weight for its shape or device is no use of it
            for value in (*args, *kwargs.values()):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(one, nn.Parameter):
                        self._used(one)
        return output

    def _run(self, name: str, call: Callable[[], Any]) -> Any:
        if name not in double_activation.FUNCTIONS:
            return call()
        inside = self.log.stack[-1] if self.log.stack else None
        line = calling_line() or "place unknown"
        return self.log.activations.run(call, double_activation.Activation(name.rstrip("_"), line, inside))

    def _cut(self, args: Any, what: str) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad and not args[0].is_leaf:
            line = calling_line()
            if line:
                site = Site(self._module(), line, what)
                self.log.detached.setdefault(site, set()).update(self._calls_behind(args[0]))

    def _calls_behind(self, t: torch.Tensor) -> set[int]:
        """Numbers of the nearest module calls that a tensor was computed from."""
        found: set[int] = set()
        todo, seen = [t.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self.nodes:
                found.add(self.nodes[node])
            else:
                todo.extend(n for n, _ in node.next_functions)
        return found

    def _overwritten(self, target: Any, name: str) -> None:
        base = target if getattr(target, "_base", None) is None else target._base
        if id(target) in self.outputs or id(base) in self.outputs:
            line = calling_line()
            if line:
                self.log.in_place[Site(self._module(), line, name)] = None

    def _written_into(self, target: Any, args: Any, kwargs: Any) -> None:
        constant = isinstance(target, torch.Tensor) and not target.requires_grad
        if constant and self.log.stack and pytree.tensors((args, kwargs)):
            self.log.needs_workarounds = True

    def _looked_up(self, input: Any, weight: Any, padding_idx: int | None = None, *_: Any, **__: Any) -> None:
        if padding_idx is not None:
            self.log.needs_workarounds = True

    def _used(self, parameter: nn.Parameter) -> None:
        owner = self.owners.get(id(parameter))
        recomputed = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        if owner is None or self._module() in owner[1] or recomputed:
            return
        if self.log.stack:
            self.log.elsewhere.setdefault(owner[0], {})[self._module()] = None
        if owner[0] not in self.log.functional:
            self.log.functional[owner[0]] = calling_line() or "place unknown"

    def _module(self) -> str:
        return self.log.stack[-1] if self.log.stack else ""


def _learns_mask(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> bool:
    return isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad


@contextmanager
def recorder(module: nn.Module, log: StepLog) -> Iterator[None]:
    """Write one training step down, as far as the log wants it."""
    keep = {path for path, m in module.named_modules() if not path or _holds_parameters(m)}
    owners = _owners(module)
    watch = _Watch(log, owners) if log.details else None
    with ExitStack() as stack:
        for path, child in module.named_modules() if log.layers else [("", module)]:
            for handle in _hooks(path, child, log, path in keep, watch):
                stack.callback(handle.remove)
        if watch is not None:
            stack.enter_context(watch)
        if log.layers:
            names = {id(p): owners[id(p)][0] for p in module.parameters() if p.requires_grad}
            stack.enter_context(_Uses(log, names, tensors_held(module)))
        yield


def _holds_parameters(module: nn.Module) -> bool:
    # With those inside: a parameter may be used by a module around its own.
    return any(p.requires_grad for p in module.parameters())


def _owners(module: nn.Module) -> dict[int, tuple[str, frozenset[str]]]:
    """Parameter id -> its name, and the paths of the modules that may use it (its owners, lists' parents too)."""
    out: dict[int, tuple[str, set[str]]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        entry = out.setdefault(id(p), (name, set()))
        entry[1].add(path)
        while isinstance(module.get_submodule(path), (nn.ParameterList, nn.ParameterDict)) and path:
            path = path.rpartition(".")[0]
            entry[1].add(path)
        if ".parametrizations." in f".{name}":
            entry[1].update(_parametrised(module, name))
    return {key: (name, frozenset(paths)) for key, (name, paths) in out.items()}


def _parametrised(module: nn.Module, name: str) -> Iterator[str]:
    """Paths of the parametrisation modules that compute a weight from a parameter, and of the layer it belongs to."""
    owner = f".{name}".split(".parametrizations.", 1)[0].lstrip(".")
    yield owner
    prefix = f"{owner}.parametrizations".lstrip(".")
    yield from (path for path, _ in module.named_modules() if path.startswith(prefix))


def _hooks(path: str, child: nn.Module, log: StepLog, keep: bool, watch: _Watch | None) -> list[Any]:
    def enter(m: nn.Module, args: Any) -> None:
        log.stack.append(path)
        if watch is not None:
            log.entered(path)

    def leave(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if log.stack:
            log.stack.pop()
        if sys.exc_info()[1] is not None:  # called because forward raised
            log.failed = path if log.failed is None else log.failed
            return
        if keep:
            kept = log.kept if path else _detached
            call = RecordedCall(*(pytree.map_leaves(kept, part) for part in (args, kwargs, output)))
            log.calls.setdefault(path, []).append(call)
        if watch is not None:
            number = log.returned(path, output)
            for t in pytree.gradient_tensors(output):
                watch.outputs[id(t)] = t
                if t.grad_fn is not None:
                    watch.nodes.setdefault(t.grad_fn, number)
                    # On the node: a second tensor hook on a view that was modified in place crashes torch 2.13.
                    t.grad_fn.register_prehook(lambda g, number=number: log.reached.add(number))

    return [
        child.register_forward_pre_hook(enter, prepend=True),
        child.register_forward_hook(leave, with_kwargs=True, always_call=True),
    ]


def _detached(_: pytree.Path, leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch._C.DisableTorchFunction():  # the recorder must not see its own detach
        # a sparse tensor is one of torch's own class, and cannot be made one of another
        return leaf.detach() if type(leaf) is torch.Tensor else leaf.detach().as_subclass(torch.Tensor)


def _shape_only(leaf: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")


def _alike_everywhere(_: pytree.Path, leaf: Any) -> Any:
    """What is kept of what is made of constants, which is the same for every sample: zeros, which are as alike."""
    with torch._C.DisableTorchFunction():
        return leaf.detach().new_zeros(()).expand(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf


def overwritten(sites: Sequence[Site]) -> list[Finding]:
    """Advice about lines that overwrite the output of a layer, if there are any."""
    if not sites:
        return []
    return [
        Finding.advice(
            "DPF023",
            f"forward overwrites the output of a layer: {sites[0]} ({len(sites)} such place(s)).",
            "Opacus's hooks cannot follow it; an engine of dpfix can.",
            help="write x = x + y instead of x += y if you want Opacus's hooks to be considered.",
            path=sites[0].module,
        )
    ]
