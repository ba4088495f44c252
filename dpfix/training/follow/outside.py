"""What leaves without noise: parameters outside the model that learn from the batches, and what is kept of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import torch
from torch import nn

from dpfix.instrument import pytree
from dpfix.instrument.source import warn_user
from dpfix.training.follow import messages
from dpfix.training.follow.calls import (
    Call,
    ModelCall,
    Place,
    line_of,
    nodes_behind,
    parts_of,
    storage_of,
    users_place,
)

if TYPE_CHECKING:
    from dpfix.training.follow.follower import Follower


class Outside:
    """Parameters outside the private model that get gradient from a private loss.

    Args:
        private: the parameters of the private model.

    Attributes:
        at_learning: called with the ids of parameters that have begun to learn.
    """

    def __init__(self, private: Collection[torch.Tensor]) -> None:
        self._private = {id(p) for p in private}
        self._learning: dict[int, ref[torch.Tensor]] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._beside: dict[int, ref[torch.Tensor]] = {}
        self._told = False
        self.at_learning: Callable[[Iterable[int]], None] = lambda ids: None

    def look(self, loss: torch.Tensor, calls: Sequence[Call | ModelCall]) -> list[torch.Tensor]:
        """Find leaves of the graph behind a loss that are not the model's own.

        The graph is walked from the loss to the model's outputs, and from the model's arguments on.

        Args:
            loss: on which ``backward`` is called.
            calls: what was written down.

        Returns:
            New ones.
        """
        models = [call for call in calls if isinstance(call, ModelCall)]
        stop = {output.edge.node for call in models for output in call.outputs}
        arguments = [t for call in models for t in parts_of((call.args, call.kwargs)) if isinstance(t, torch.Tensor)]
        starts = [t.grad_fn for t in (loss, *arguments) if t.grad_fn is not None]
        direct = [t for t in arguments if t.requires_grad and t.grad_fn is None]
        found = [*direct, *_leaves(starts, stop)]
        known = (self._private, self._learning, self._beside)
        return [t for t in found if not any(id(t) in ids for ids in known)]

    def learn(self, parameters: Sequence[torch.Tensor], *, with_model: bool) -> None:
        """These get gradient from a loss over private data from now on.

        Args:
            parameters: new ones.
            with_model: whether the private model is in that loss, so that they are trained together.
        """
        new = {id(p): ref(p) for p in parameters}
        self._learning |= new
        self._values |= {id(p): p.detach().clone() for p in parameters if with_model}
        self.at_learning(new)

    def refuse_moved(self) -> None:
        """None that is trained with the model has changed since it was found, by whatever."""
        for key, value in self._values.items():
            p = self._learning[key]()
            if p is not None and (p.shape != value.shape or not torch.equal(p, value)):
                raise messages.moved_outside(tuple(p.shape))

    def take_over(self, earlier: Outside) -> None:
        """What has begun to learn so far goes on learning."""
        self._learning |= earlier._learning
        self._values |= earlier._values
        self._beside |= earlier._beside
        self._told = earlier._told
        self.at_learning([*self._learning, *self._beside])

    def learn_beside(self, parameters: Sequence[torch.Tensor]) -> None:
        """These get gradient from a loss over private data that is not the private model's."""
        self._beside |= {id(p): ref(p) for p in parameters}
        self.at_learning(self._beside)

    def tell(self, p: Any, optimizer: str) -> None:
        """Say once that an optimizer steps over such a parameter."""
        held = self._beside.get(id(p))
        if not self._told and held is not None and held() is p and p.grad is not None:
            self._told = True
            warn_user(
                f"{optimizer}.step(): it trains another model (a parameter of shape {tuple(p.shape)}) on the batches of the "
                "private data_loader. Private is the model that was passed to make_private_safe, and what learns from its "
                "outputs alone; nothing is guaranteed about the other one, which must not be published with it."
            )

    def learns(self, p: Any) -> bool:
        """Whether a parameter has gradient from a private loss."""
        held = self._learning.get(id(p))
        return held is not None and held() is p and p.grad is not None


def refuse_write(module: nn.Module, args: Any, kwargs: Any, frame: FrameType | None) -> None:
    """Parameters and buffers of the model get no values of a batch, whatever writes them into the first argument or ``out``."""
    written = {storage_of(t) for t in pytree.tensors((args[:1], kwargs.get("out")))}
    if any(storage_of(t) in written for t in (*module.parameters(), *module.buffers())):
        raise messages.written_by_hand(type(module).__name__, line_of(users_place(frame)))


class Strangers:
    """Tensors in the loss, or given to the model, of which nobody knows where they come from.

    One that the script keeps, or that always holds the same, is a setting. One that it makes anew in every step may hold
    anything of the batch: by NumPy, in another thread, by a scripted or mapped function.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def look(self, calls: Sequence[Call | ModelCall], follower: Follower) -> Place | bool:
        """Look for one that is not what it was in the step before.

        Args:
            calls: those that the loss is made of.
            follower: knows what was made of the batch, and what was not.

        Returns:
            The place where it is taken; true if it is an argument of the model; false if there is none.
        """
        made: set[int] = set()
        found: Place | bool = False
        for call in calls:
            place = call.place if isinstance(call, Call) else "model"
            for k, part in enumerate(parts_of((call.args, call.kwargs))):
                if id(part) in made or not isinstance(part, (torch.Tensor, np.ndarray)):
                    continue
                if isinstance(part, torch.Tensor) and (part.grad_fn is not None or follower.is_plain(part)):
                    continue
                if follower.sources.of(part) is not None or isinstance(part, nn.Parameter):
                    continue
                before = self._known.get((place, k))
                self._known[place, k] = part.detach() if isinstance(part, torch.Tensor) else part
                if before is not None and before is not part and not _same(before, part):
                    found = found or (call.place if isinstance(call, Call) else True)
            made |= {id(part) for part in parts_of(call.result)}
        return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b)
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.detach()))


def comes_from(tensor: torch.Tensor, calls: Sequence[ModelCall]) -> bool:
    """Whether there is a way in the graph from a tensor to an output of the model."""
    if tensor.grad_fn is None:
        return False
    wanted = {output.edge.node for call in calls for output in call.outputs}
    return bool(wanted & {tensor.grad_fn, *nodes_behind(tensor.grad_fn)})


def fed_with(starts: Sequence[torch.Tensor], held: Iterable[torch.Tensor]) -> bool:
    """Whether the graphs behind some tensors keep any of these tensors, or a view of one, as an input.

    Args:
        starts: tensors with graphs.
        held: tensors of batches.

    Returns:
        Whether they do; a copy that was made of one is not seen.
    """
    storages = {t.untyped_storage().data_ptr() for t in held if t.layout is torch.strided and t.numel()}
    nodes = [t.grad_fn for t in starts if t.grad_fn is not None]
    for node in {*nodes, *(n for start in nodes for n in nodes_behind(start))}:
        for name in dir(node) if storages else ():
            if not name.startswith("_saved_"):
                continue
            try:
                kept = getattr(node, name)
            except RuntimeError:  # freed by an earlier backward pass
                continue
            if (
                isinstance(kept, torch.Tensor)
                and kept.layout is torch.strided
                and kept.untyped_storage().data_ptr() in storages
            ):
                return True
    return False


def _leaves(starts: Sequence[Any], stop: set[Any]) -> list[torch.Tensor]:
    todo, seen = [node for node in starts if node not in stop], set(starts) | stop
    found = []
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found
