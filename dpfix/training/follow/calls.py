"""What is written down of a step: calls of torch functions, and calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from dpfix.instrument import pytree
from dpfix.instrument.precision import InBFloat16, device_of
from dpfix.instrument.source import is_users_file
from dpfix.layout.calls import CallLayout
from dpfix.layout.sample_dim import SampleDim
from dpfix.weights.copies import unwrap

Place = tuple[CodeType, int]
"""A place in the script: a code object and the offset of an instruction in it."""

RANDOM = frozenset([
    "alpha_dropout",
    "alpha_dropout_",
    "bernoulli",
    "bernoulli_",
    "binomial",
    "cauchy_",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_",
    "exponential_",
    "feature_alpha_dropout",
    "feature_dropout",
    "feature_dropout_",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "geometric_",
    "gumbel_softmax",
    "log_normal_",
    "multinomial",
    "native_dropout",
    "normal",
    "normal_",
    "poisson",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "random_",
    "randperm",
    "rrelu",
    "rrelu_",
    "scaled_dot_product_attention",
    "uniform_",
])
"""Functions that draw from torch's generators; they draw the same when they are repeated."""

LIKE = frozenset(f"{kind}_like" for kind in ("empty", "ones", "rand", "randint", "randn", "zeros"))
"""Functions that take nothing but shape and type from a tensor."""

ARITHMETIC = frozenset([
    "__pow__",
    "__radd__",
    "__rdiv__",
    "__rfloordiv__",
    "__rmul__",
    "__rpow__",
    "__rsub__",
    "__rtruediv__",
    "add",
    "add_",
    "addcdiv",
    "addcmul",
    "as_tensor",
    "clamp",
    "clamp_max",
    "clamp_min",
    "div",
    "div_",
    "divide",
    "divide_",
    "fill_",
    "floor_divide",
    "floor_divide_",
    "full",
    "full_like",
    "lerp",
    "masked_fill",
    "masked_fill_",
    "mul",
    "mul_",
    "multiply",
    "multiply_",
    "new_full",
    "new_tensor",
    "pow",
    "rsub",
    "scalar_tensor",
    "sub",
    "sub_",
    "subtract",
    "subtract_",
    "tensor",
    "true_divide",
    "true_divide_",
    "where",
])
"""Functions whose Python numbers scale, shift or make values."""

TELL_NOTHING = frozenset([
    "__deepcopy__",
    "__format__",
    "__get__",
    "__hash__",
    "__len__",
    "__reduce_ex__",
    "__repr__",
    "__str__",
    "can_cast",
    "data_ptr",
    "dim",
    "element_size",
    "get_device",
    "has_names",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "is_nonzero_",
    "is_pinned",
    "is_same_size",
    "is_shared",
    "is_storage",
    "is_tensor",
    "names",
    "ndimension",
    "nelement",
    "numel",
    "promote_types",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "result_type",
    "retain_grad",
    "size",
    "storage",
    "storage_offset",
    "stride",
    "type",
    "untyped_storage",
])
"""Functions that give shapes, types and the like; they are not written down unless they give a tensor."""


MAKES = frozenset({"tensor", "as_tensor", "full", "scalar_tensor"})
"""Functions that make tensors of Python numbers."""
GIVES_MEMORY = frozenset({"numpy", "__array__", "__dlpack__"})
"""Functions through which a script may write into a tensor unseen."""
LENGTHS = frozenset({"__len__", "numel", "size", "__get__", "nelement"})
"""Functions that give lengths and shapes."""
SELECTS = frozenset({"nonzero", "masked_select", "unique", "argwhere", "unique_consecutive"})
"""Functions whose result is as long as a batch has elements of some kind."""


def selects(name: str, args: Any) -> bool:
    """Whether the length of what a function gives depends on the values that it is given."""
    masks = (part for part in parts_of(args[1:]) if isinstance(part, torch.Tensor)) if name == "__getitem__" else ()
    return name in SELECTS or any(mask.dtype is torch.bool for mask in masks)


def storage_of(t: torch.Tensor) -> int:
    """Where the memory of a tensor begins; another number for each that has none of its own."""
    inside_vmap = torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]
    return id(t) if inside_vmap or t.layout is not torch.strided else t.untyped_storage().data_ptr()


def writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function of that name writes into its first argument, or into ``out``."""
    return (name.endswith("_") and not name.endswith("__")) or name in {"__setitem__", "__set__"} or "out" in kwargs


@dataclass(slots=True, eq=False)
class Call:
    """One call of a torch function.

    Attributes:
        function: the function.
        name: its name.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned.
        place: where in the script.
        grad: whether gradients were enabled.
        state: state of torch's generator before it, if it draws.
        autocast: devices and types of the autocast regions around it.
        version: how often the result had been written to.
    """

    function: Callable[..., Any]
    name: str
    args: Any
    kwargs: Any
    result: Any
    place: Place
    grad: bool
    state: torch.Tensor | None = None
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    version: int = 0

    @property
    def tells(self) -> bool:
        """Whether it made Python values of a tensor's values."""
        return not isinstance(self.result, torch.Tensor) and self.result is not None and not pytree.tensors(self.result)


@dataclass(slots=True, eq=False)
class Output:
    """A tensor that the model returned.

    Attributes:
        tensor: the tensor.
        edge: where it is in the graph, whatever the script writes into it later.
        dim: how it carries the samples; ``None`` if it carries none or cannot be told.
        version: how often it had been written to.
    """

    tensor: torch.Tensor
    edge: Any
    dim: SampleDim | None
    version: int


@dataclass(slots=True, eq=False)
class ModelCall:
    """One call of the private model.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned.
        layout: how it carried the samples; ``None`` if the probe has not shown such a call.
        samples: number of samples.
        state: state of torch's generators before it.
        outputs: tensors that it returned and that carry gradient.
        deliveries: the delivered batches that its arguments come from.
        autocast: devices and types of the autocast regions around it.
        given: what arguments were that the script has written into since, by identity.
    """

    args: Any
    kwargs: Any
    result: Any
    layout: CallLayout | None
    samples: int
    state: Any
    outputs: list[Output] = field(default_factory=list)
    deliveries: set[Any] = field(default_factory=set)
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    given: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def arguments(self) -> list[tuple[pytree.Path, torch.Tensor]]:
        """The tensors of its arguments with their paths, as they were when it was called."""
        found = pytree.leaves((self.args, self.kwargs))
        return [(path, self.given.get(id(t), t)) for path, t in found if isinstance(t, torch.Tensor)]

    def keep(self, t: torch.Tensor) -> None:
        """A tensor is about to be written into; if it was an argument, remember what it was."""
        if id(t) not in self.given and any(t is argument for _, argument in pytree.leaves((self.args, self.kwargs))):
            self.given[id(t)] = t.detach().clone()


@contextmanager
def in_autocast(regions: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    """Enter autocast regions.

    Args:
        regions: as :func:`autocast_regions` gives them.

    Yields:
        Nothing.
    """
    with ExitStack() as around:
        for device, dtype in regions:
            around.enter_context(torch.autocast(device, dtype))
        yield


def autocast_regions(module: nn.Module | None = None) -> tuple[tuple[str, torch.dtype], ...]:
    """Devices and types of the autocast regions that are entered now, or that the model enters when it is called."""
    if module is not None and isinstance(unwrap(module), InBFloat16):
        return ((device_of(module), torch.bfloat16),)
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


def nodes_behind(node: Any, limit: int = 20_000) -> set[Any]:
    """The nodes of a graph that gradient reaches from a node, without itself."""
    todo, seen = [node], set[Any]()
    while todo and len(seen) < limit:
        new = {following for following, _ in todo.pop().next_functions if following is not None} - seen
        seen |= new
        todo += new
    return seen


def graph_edges(nodes: list[Any], limit: int = 20_000) -> set[tuple[str, str]]:
    """Which kinds of nodes follow each other in the graph behind some outputs.

    A loop over more or fewer steps has the same pairs; a branch that was not taken before has others.

    Args:
        nodes: the outputs' nodes.
        limit: how many nodes are looked at, at most.

    Returns:
        Pairs of names.
    """
    found: set[tuple[str, str]] = set()
    todo = [(node, node.name()) for node in nodes]
    seen = {node for node, _ in todo}
    while todo and len(seen) < limit:
        node, name = todo.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            next_name = following.name()
            found.add((name, next_name))
            if following not in seen:
                seen.add(following)
                todo.append((following, next_name))
    return found


def inner_nodes(nodes: list[Any]) -> set[Any]:
    """The nodes of a graph that others of the same list are made of.

    Args:
        nodes: of a model's outputs.

    Returns:
        Those behind others.
    """
    wanted = set(nodes)
    return wanted & set().union(*map(nodes_behind, wanted))


def parts_of(tree: Any) -> list[Any]:
    """All containers and leaves of arguments, also inside slices."""
    out = [tree]
    if isinstance(tree, slice):
        return [tree, tree.start, tree.stop, tree.step]
    for _, part in pytree.children(tree) or ():
        out += parts_of(part) if not isinstance(part, (int, float, str, bool, type(None))) else ()
    return out


def users_place(frame: FrameType | None) -> Place:
    """Where in the script a frame is, or was called."""
    while frame is not None and not is_users_file(frame.f_code.co_filename):
        frame = frame.f_back
    return (NOWHERE, 0) if frame is None else (frame.f_code, frame.f_lasti)


NOWHERE = (lambda: None).__code__
"""Stands for a place that is not known."""


def line_of(place: Place) -> str:
    """A place in the script as ``file:line``; empty if it is not known."""
    code, offset = place
    if code is NOWHERE:
        return ""
    line = next((line for start, end, line in code.co_lines() if start <= offset < end and line), code.co_firstlineno)
    return f"{code.co_filename.rpartition('/')[2]}:{line}"


def overwrites(call: Call | ModelCall) -> bool:
    """Whether a call writes into its first argument, or into ``out``."""
    return isinstance(call, Call) and writes(call.name, call.kwargs)
