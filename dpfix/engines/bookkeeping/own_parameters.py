"""Modules that use parameters of their own on the whole batch: only the functions that touch these are diverted.

The probe has shown every such function, and where in its arguments and its result the samples are. What is made of
parameters and constants alone (a table that is indexed, a scale that is squared) is computed once, with a graph of its
own, and handled like a parameter. Where it meets the samples, a product with a weight or a lookup is a layer rule; in any
other function that broadcasts it is given to each sample, so that autograd itself leaves per-sample gradients there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Kept
from dpfix.engines.bookkeeping.embedding import Embedding
from dpfix.engines.bookkeeping.forward import ReplacedForward
from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.engines.bookkeeping.iteration import RootCall
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, Recorded, Report, pulled_back
from dpfix.engines.bookkeeping.linear import Linear
from dpfix.engines.bookkeeping.norms import GroupNorm, LayerNorm
from dpfix.engines.replaced import transformed
from dpfix.errors import PlanBrokenError
from dpfix.instrument import pytree
from dpfix.instrument.parameter_uses import MARK, ParameterUses, arguments, bare, function_in, made, result, used_in
from dpfix.layout.calls import LayerLayout
from dpfix.layout.rows import Rows, rows_of

_LINEAR, _EMBEDDING, _GROUP_NORM, _LAYER_NORM = Linear(), Embedding(), GroupNorm(), LayerNorm()

_ARITHMETIC = (
    "add", "sub", "mul", "div", "true_divide", "truediv", "pow", "maximum", "minimum", "addcmul", "addcdiv", "lerp", "where",
)  # fmt: skip
BROADCASTING = frozenset(
    name for f in _ARITHMETIC for name in (f, f"{f}_", f"r{f}", f"__{f}__", f"__r{f}__", f"__i{f}__")
)
EXPANDING = frozenset({"expand", "expand_as", "broadcast_to"})


class Spread(torch.autograd.Function):
    """A value that is the same for all samples, along their dimension; what comes back is split by sample."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, anchor: torch.Tensor, boxed: tuple[torch.Tensor], size: int, rows: Rows, report: Callable[..., None]
    ) -> torch.Tensor:
        (value,) = boxed  # in a box, so that the graph does not lead to the parameter itself
        ctx.rows, ctx.report = rows, report
        shape = [size if d == rows.dim else length for d, length in enumerate(value.shape)]
        return value.detach().expand(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # noqa: D102
        ctx.report(Kept(ctx.rows.split(g).sum(ctx.rows.dim + 1)))
        return None, None, None, None, None


class OwnUses(ParameterUses):
    """One call of a module: its functions on its own parameters.

    Args:
        parameters: the parameters by name.
        forward: where they are used.
    """

    def __init__(self, forward: OwnParametersForward, call: RootCall) -> None:
        parameters = forward.handle.held(forward.parameters)
        super().__init__({id(p): name for name, p in parameters.items()})
        self.forward, self.call = forward, call
        self.leaves = {p: p.detach().requires_grad_() for p in parameters.values()}
        for name, p in parameters.items():
            self.leaves[p].register_post_accumulate_grad_hook(partial(_past, name))
        self.parameters = {leaf: p for p, leaf in self.leaves.items()}

    @override
    def used(self, use: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handle = self.forward.handle
        use = made(use) if handle.shown(made(use)) else use
        if not handle.shown(use):
            output = func(*args, **kwargs)
            return handle.layout(use, 0) if pytree.gradient_tensors(output) else output  # which raises
        if transformed():
            raise NotImplementedError(f"`{use}` is under vmap")
        layout = handle.layout(use, handle.count_call(use))
        if derives(layout):
            if any(t.requires_grad and not self.named(t) for t in arguments(args, kwargs)):
                raise NotImplementedError(
                    f"`{use}` was made of parameters and constants alone when the step was checked"
                )
            own: dict[int, torch.Tensor] = {id(p): leaf for p, leaf in self.leaves.items()}
            output = func(*replaced(own, args), **replaced(own, kwargs))
            self.name(result(func, args, output), use)
            return output
        return MEETINGS[function_in(use)](Meeting(self, layout), func, args, kwargs)


def _past(name: str, leaf: torch.Tensor) -> None:
    raise PlanBrokenError(
        f"what is made of parameter `{name}` is used by a function that the engine does not see.",
        help="Pass the training_step your loop really makes, or grad_sample_mode='microbatch'.",
        path=name,
    )


class Meeting:
    """One function on own parameters and samples.

    Args:
        uses: the call of the module.
        layout: where the samples are.
    """

    def __init__(self, uses: OwnUses, layout: LayerLayout) -> None:
        self.uses, self.samples = uses, uses.call.samples
        self.anchor = uses.forward.handle.anchor
        self.dims = dict(layout.inputs)
        self.out = layout.output[0][1]
        reporter = uses.call.reporter(self.samples)
        self.report: Report = lambda p, found: reporter(uses.parameters.get(p, p), found)  # type: ignore[arg-type]

    def spread(self, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A parameter, or what was made of parameters, given to each sample.

        Args:
            shape: of the function's result.

        Returns:
            The value with as many dimensions as the result, and the samples in theirs.
        """
        assert self.out is not None
        rows = rows_of(torch.empty(shape, device="meta"), self.out, self.samples)
        whole = value.detach().view((1,) * (len(shape) - value.dim()) + value.shape)
        if whole.shape[rows.dim] != 1:
            raise NotImplementedError("a parameter has a dimension where the samples are")
        return Spread.apply(self.anchor, (whole,), shape[rows.dim], rows, lambda found: self._found(value, found))

    def _found(self, value: torch.Tensor, found: Kept) -> None:
        gradients = found.gradients.reshape(-1, *value.shape)
        if isinstance(value, nn.Parameter):
            self.report(value, Kept(gradients))
            return
        sources: Any = tuple(self.uses.parameters)
        for leaf, own in pulled_back(value, sources, gradients):
            self.report(leaf, Kept(own))

    def applied(
        self, rule: LayerRule, settings: Any, x: torch.Tensor, place: Any, weight: Any, bias: Any = None
    ) -> Any:
        """A layer rule.

        Args:
            settings: what the rule asks of a module.
            x: its input.
            place: where the input is among the arguments.

        Returns:
            The output.
        """
        dim = self.dims.get(place)
        if dim is None:
            raise NotImplementedError("a weight is applied to what does not depend on the samples")
        sources: Any = tuple(self.uses.parameters)
        layer = LayerCall(settings, rows_of(x, dim, self.samples), self.report, weight, bias, sources)
        return rule.finish(x, Recorded.apply(rule.prepare(settings, x), self.anchor, rule, layer))


def _broadcast(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    every = list(arguments(args, kwargs))
    shape = torch.broadcast_shapes(*(t.shape for t in every))
    given = {id(t): meeting.spread(t, shape) for t in every if meeting.uses.named(t)}
    return func(*replaced(given, args), **replaced(given, kwargs))


def _expand(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    shape = func(args[0].detach(), *args[1:], **kwargs).shape
    return meeting.spread(args[0], shape).expand(shape)


def _repeat(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    value, *times = args
    times = list(times[0] if times and isinstance(times[0], (tuple, list, torch.Size)) else times or kwargs["repeats"])
    assert meeting.out is not None
    shape = list((1,) * (len(times) - value.dim()) + value.shape)
    shape[meeting.out.dim] *= times[meeting.out.dim]
    times[meeting.out.dim] = 1
    return meeting.spread(value, torch.Size(shape)).repeat(times)


def _set_item(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    x, mask, value = args
    masked = isinstance(mask, torch.Tensor) and mask.dtype is torch.bool
    if not masked or meeting.uses.named(x) or value.dim() > x.dim() - mask.dim():
        raise NotImplementedError("a parameter is written elsewhere than where a mask says")
    func(x, mask, meeting.spread(value, x.shape).expand(x.shape)[mask])


def _linear(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    (input, weight, bias), place = _bound(("input", "weight", "bias"), args, kwargs)
    return meeting.applied(_LINEAR, None, input, place["input"], weight, bias)


def _matmul(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    x, weight = args[0], args[1]
    if not meeting.uses.named(weight) or weight.dim() != 2 or x.dim() < 2:
        raise NotImplementedError("a parameter is multiplied in another way than as a weight")
    leaf = meeting.uses.leaves[weight] if isinstance(weight, nn.Parameter) else weight
    return meeting.applied(_LINEAR, None, x, (0, 0), leaf.mT)


def _embedding(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    if func is torch.embedding:
        ids, weight, padding = args[1], args[0], args[2] if len(args) > 2 and args[2] >= 0 else None
        return meeting.applied(_EMBEDDING, SimpleNamespace(padding_idx=padding), ids, (0, 1), weight)
    (ids, weight, padding), place = _bound(("input", "weight", "padding_idx"), args, kwargs)
    if len(args) > 3 or set(kwargs) - {"input", "weight", "padding_idx"}:
        options = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), args[3:], strict=False)) | kwargs
        if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
            raise NotImplementedError("a table is rescaled")
    padding = None if padding is None else padding % len(weight)
    return meeting.applied(_EMBEDDING, SimpleNamespace(padding_idx=padding), ids, place["input"], weight)


def _attention(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    (query, key, _, mask), _ = _bound(("query", "key", "value", "attn_mask"), args, kwargs)
    if any(meeting.uses.named(t) for t in arguments(args, kwargs) if t is not mask):
        raise NotImplementedError("queries, keys or values are made of parameters alone")
    shape = torch.broadcast_shapes((*query.shape[:-1], key.shape[-2]), mask.shape)
    given = {id(mask): meeting.spread(mask, shape)}
    return func(*replaced(given, args), **replaced(given, kwargs))


def _group_norm(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    return _norm(meeting, _GROUP_NORM, "num_groups", args, kwargs)


def _layer_norm(meeting: Meeting, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    return _norm(meeting, _LAYER_NORM, "normalized_shape", args, kwargs)


def _norm(meeting: Meeting, rule: LayerRule, setting: str, args: Any, kwargs: Any) -> torch.Tensor:
    (input, value, weight, bias, eps), place = _bound(("input", setting, "weight", "bias", "eps"), args, kwargs)
    settings = SimpleNamespace(eps=1e-5 if eps is None else eps, **{setting: value})
    return meeting.applied(rule, settings, input, place["input"], weight, bias)


def _bound(names: tuple[str, ...], args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name, and where they are."""
    places = {n: (0, i) if i < len(args) else (1, n) for i, n in enumerate(names)}
    return [args[i] if i < len(args) else kwargs.get(n) for i, n in enumerate(names)], places


MEETINGS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(BROADCASTING, _broadcast),
    **dict.fromkeys(EXPANDING, _expand),
    "repeat": _repeat,
    "__setitem__": _set_item,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
}
"""What is done where parameters and samples meet, by the name of the function."""


def derives(layout: LayerLayout) -> bool:
    """Whether a use makes something of parameters and constants alone."""
    return all(dim is None for _, dim in (*layout.inputs, *layout.output))


def replaced(given: Mapping[int, torch.Tensor], tree: Any) -> Any:
    """Arguments with other tensors in the place of some."""
    return pytree.map_leaves(lambda _, leaf: given.get(id(leaf), leaf), tree)


def can_divert(names: Iterable[str], layers: Iterable[LayerLayout]) -> bool:
    """Whether all uses of some parameters, as the probe has shown them, are known.

    Args:
        names: the parameters' names.
        layers: what the probe has shown.

    Returns:
        Whether they are, and every parameter is used.
    """
    own, seen = set(names), set[str]()
    uses = [layer for layer in layers if MARK in layer.path]
    kinds = {bare(use.path): use.path for use in uses}
    for use in uses:
        parts = set(used_in(use.path))
        if not parts & own:
            continue
        function = function_in(use.path)
        if parts - own or use.problem or kinds[bare(use.path)] != use.path:
            return False
        seen |= parts
        if use.path.endswith(")") and derives(use):
            own.add(use.path)
        elif function not in MEETINGS or len(use.output) != 1 or use.output[0][1] is None:
            return False
    return seen >= set(names)


class OwnParametersForward(ReplacedForward):
    """For a module that runs on the whole batch but for its functions on some parameters.

    Args:
        parameters: these parameters by the name that the probe knows them by.
    """

    def __init__(
        self, handle: BookkeepingHandle, module: nn.Module, path: str, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__(handle, module, path)
        self.parameters = dict(parameters)

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.original(*args, **kwargs)

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with OwnUses(self, call):
            return self.original(*args, **kwargs)
