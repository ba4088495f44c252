"""An activation applied to what has already gone through one, found in the autograd graph of a loss.

A sigmoid of a probability lies in [0.5, 0.7311] and a softmax of probabilities is nearly flat: the loss still falls a
little, its gradients are many times smaller, and under DP-SGD they disappear in the noise. The graph is walked from
each activation back through operations that keep probabilities what they are (views, casts, means, scalings by one
number) and nothing else: a convolution, a product of two activations (gates, squeeze-excitation, SiLU) or a logarithm
in between makes logits of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dpfix.report.finding import Finding, Fixability, Severity

FUNCTIONS = frozenset(
    {"sigmoid", "sigmoid_", "hardsigmoid", "softmax", "softmin", "gumbel_softmax", "log_softmax", "log_sigmoid"}
    | {"special_expit", "special_softmax", "special_log_softmax", "cross_entropy"}
    | {"binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"}
)
"""Torch functions that apply an activation, by the name with which Python calls them."""

_PROBABILITIES = frozenset({"Sigmoid", "Hardsigmoid", "Softmax"})
"""What makes probabilities of logits. A second softmax of a log-softmax changes nothing, so that is not among them."""

_OF_LOGITS = _PROBABILITIES | {"LogSoftmax", "LogSigmoid", "BinaryCrossEntropyWithLogits"}
"""What expects logits."""

_VIEWS = frozenset(
    {"View", "UnsafeView", "Reshape", "ReshapeAlias", "AsStrided", "Alias", "Clone", "ToCopy", "Expand", "Permute"}
    | {"Transpose", "T", "Movedim", "Squeeze", "Unsqueeze", "Slice", "Select", "Narrow", "Split", "SplitWithSizes"}
    | {"Chunk", "Unbind", "Unfold", "Index", "IndexSelect", "Gather", "Take", "MaskedSelect", "Flip", "Roll", "Repeat"}
    | {"ConstantPadNd", "NanToNum", "Clamp", "ClampMin", "ClampMax", "Rsub", "Stack", "Cat", "Add"}
)
_MEANS = frozenset(
    {"Mean", "Sum", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D"}
    | {f"Upsample{kind}" for kind in ("Nearest1D", "Nearest2D", "Nearest3D", "Linear1D", "Bilinear2D", "Trilinear3D")}
)
_SCALINGS = {"Mul": ("_saved_other", "_saved_self"), "Div": ("_saved_other", "")}
"""Where a product keeps its constant, if the gradient goes to its first and to its second factor."""

_next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr  # pyright: ignore[reportAttributeAccessIssue]

_FARTHEST = 100
"""Number of operations after which the walk gives up."""


@dataclass(frozen=True)
class Activation:
    """One application of an activation.

    Attributes:
        what: the function.
        line: ``file:line`` of the code that called it.
        module: path of the module that was being called; ``None`` outside the model, in the loss.
    """

    what: str
    line: str
    module: str | None

    def __str__(self) -> str:
        where = "outside the model" if self.module is None else f"in `{self.module}`" if self.module else "in the model"
        return f"{self.what} {where} ({self.line})"


@dataclass(frozen=True)
class Repeated:
    """An activation of what another one has already made.

    Attributes:
        first: what made probabilities.
        second: what took them for logits.
    """

    first: Activation
    second: Activation


@dataclass
class Calls:
    """Which nodes of the graph were made by which call, told by the number that autograd gives every node."""

    _made: list[tuple[int, int, Activation]] = field(default_factory=list)

    def run(self, call: Callable[[], Any], activation: Activation) -> Any:
        """Run a call and remember which nodes it made.

        Returns:
            What the call returns.
        """
        first = _next_number()
        out = call()
        self._made.append((first, _next_number(), activation))
        return out

    def of(self, node: Any) -> Activation:
        """The call that made a node.

        Returns:
            The call, or the name of the node if no call is known to have made it.
        """
        number = node._sequence_nr()
        known = (activation for first, last, activation in self._made if first <= number < last)
        return next(known, Activation(_kind(node), "place unknown", ""))


def repeated(loss: torch.Tensor, calls: Calls) -> tuple[Repeated, ...]:
    """Find every activation that is applied to what has already gone through one.

    Returns:
        One entry per pair of lines.
    """
    found: dict[Repeated, None] = {}
    known: dict[Any, Any] = {}
    for node in _graph(loss.grad_fn):
        if _kind(node) not in _OF_LOGITS:
            continue
        first = _source(node.next_functions[0][0], known)
        if first is not None:
            found[Repeated(calls.of(first), calls.of(node))] = None
    return tuple(found)


def _graph(root: Any) -> Iterator[Any]:
    seen, todo = {root}, [root]
    while todo:
        node = todo.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)


def _kind(node: Any) -> str:
    """``MeanBackward1`` -> ``Mean``."""
    return node.name().partition("Backward")[0]


def _source(node: Any, known: dict[Any, Any], depth: int = 0) -> Any:
    """The activation whose probabilities a node still holds; ``None`` if it holds something else."""
    if node is None or depth > _FARTHEST:
        return None
    if node not in known:
        known[node] = node if _kind(node) in _PROBABILITIES else _passed_on(node, known, depth)
    return known[node]


def _passed_on(node: Any, known: dict[Any, Any], depth: int) -> Any:
    kind, edges = _kind(node), node.next_functions
    below = [n for n, _ in edges if n is not None]
    if kind in _SCALINGS and len(below) == 1:
        # the factor is looked at last: with activation checkpointing that computes the layer anew
        first = _source(below[0], known, depth + 1)
        return first if first is not None and _is_number(node, _SCALINGS[kind][edges[0][0] is None]) else None
    if kind == "Add" and len(below) < 2:  # a constant added moves probabilities to another range: noise, a bias
        return None
    if kind not in _VIEWS and kind not in _MEANS:
        return None
    sources = [_source(n, known, depth + 1) for n in below]
    return sources[0] if sources and None not in sources else None


def _is_number(node: Any, constant: str) -> bool:
    """Whether a product's constant factor is one number, or one per channel: no mask, no image."""
    value = getattr(node, constant, None)
    return value is not None and (not torch.is_tensor(value) or sum(size > 1 for size in value.shape) < 2)


def finding(model: str, pair: Repeated) -> Finding:
    """The finding about an activation of probabilities.

    Returns:
        It blocks training if the second one is in the loss; inside the model it may be meant and is advice.
    """
    in_loss = pair.second.module is None
    fact = f"{pair.second} is applied to the probabilities that {pair.first} has made ({model})."
    return Finding(
        "DPF030",
        Severity.BLOCKS_TRAINING if in_loss else Severity.ADVICE,
        Fixability.NOTHING,
        fact[0].upper() + fact[1:],
        "an activation of probabilities is nearly flat (a sigmoid of them lies in [0.5, 0.7311]): gradients shrink, and "
        "noise of the same size drowns them.",
        help="apply one of the two: let the model return logits, or take a loss that expects probabilities (BCELoss, "
        "NLLLoss of a log, sigmoid=False and softmax=False in MONAI's losses)."
        if in_loss
        else "if it is not meant, take one of the two out.",
        path=(pair.first.module or "") if in_loss else (pair.second.module or ""),
    )
