"""The state of a private training for ``torch.distributed.checkpoint``, which saves and loads it with any number of processes.

Weights and the optimizer's state are torch's own, a part of them on every process. What was released is a text that is the
same on all of them, so that the budget goes on wherever the state is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dpfix.errors import CheckpointError
from dpfix.instrument.sharded import hide_shards
from dpfix.sampling.randomness import Stream
from dpfix.training.guards.ranks import compare_ranks, number_of_ranks
from dpfix.training.releases import read_state

ENTRY = "dpfix"
"""Where the text stands in the state."""


def state_of(optimizer: Any) -> dict[str, Any]:
    """The state of the training that a private optimizer belongs to; every process has to call it.

    Args:
        optimizer: the private optimizer.

    Returns:
        Weights, the optimizer's state, and what was released.
    """
    guard = optimizer.guard
    module = guard.guarded.module
    hide_shards(module)
    with guard.others.stepping():  # torch makes a step without gradients where the optimizer has no state yet
        weights, state = get_state_dict(module, optimizer.original_optimizer)
    told = {"releases": guard.guarded.accounting.releases(), "ranks": number_of_ranks(optimizer)}
    return {"model": weights, "optimizer": state, ENTRY: json.dumps(told)}


def load_into(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Go on from a state; every process has to call it.

    Noise and draws are new ones, also with a seed: what the seed gives anew would be added to other sums a second time.

    Args:
        optimizer: the private optimizer of a call that was made in the same way.
        state: as :func:`state_of` gives it.

    Raises:
        CheckpointError: it does not say what was released; nothing is changed.
    """
    told = _read(state.get(ENTRY))
    trainings, _ = read_state(told["releases"])
    guard, accounting = optimizer.guard, optimizer.guard.guarded.accounting
    module = guard.guarded.module
    hide_shards(module)
    with guard.others.stepping():
        set_state_dict(
            module,
            optimizer.original_optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    accounting.loads += 1
    accounting.take(told["releases"])
    compare_ranks(told.get("ranks"), optimizer)
    guard.noise.went_back()
    made = sum(r.steps for r in trainings)
    for stream in (optimizer.randomness.noise, optimizer.randomness.draws):
        if isinstance(stream, Stream):
            stream.branch(made)


def _read(text: Any) -> dict[str, Any]:
    try:
        told = json.loads(text)
        return {"releases": told["releases"], "ranks": told.get("ranks")}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the state does not say what was released: {type(error).__name__}: {error}.",
            "Without it, epsilon would leave out what was released before.",
            "Save the training itself: torch.distributed.checkpoint.save({'training': private}), and load it the same way.",
            path=ENTRY,
        ) from error


def refuse_files(optimizer: Any) -> None:
    """A file that one process writes cannot hold a model that is spread over several.

    Raises:
        CheckpointError: the model is.
    """
    guard = getattr(optimizer, "guard", None)
    if guard is not None and guard.guarded.shards is not None:
        raise CheckpointError(
            "fully_shard was called on the model, and no process holds the whole of it.",
            "A file of one process would have its parts only, and every process has noise of its own to go on with.",
            "Call torch.distributed.checkpoint.save({'training': private}, checkpoint_id=folder) on all ranks, where private is "
            "what make_private_safe returned, and torch.distributed.checkpoint.load in the same way.",
            path="module",
        )
