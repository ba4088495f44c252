"""A lack of memory: how it is told from other errors, and what is said about a step for which the memory did not suffice.

Where :mod:`dpfix.training.guards.memory` cannot begin the batch again, the error comes out of the script's own lines, which only
the script can run again: the text says with which size.
"""

from __future__ import annotations

import torch

from dpfix.instrument.freed_memory import give_back
from dpfix.sampling.ledger import DrawLedger

_OURS = "dpfix: memory ran out"
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises where it cannot have as much memory as it needs."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _ON_CPU in str(error))


def say_size(error: BaseException, ledger: DrawLedger | None) -> None:
    """Add to an error that memory ran out which size of physical batches to take.

    Args:
        error: what was raised.
        ledger: knows the samples that the loop works on; ``None`` where the loader draws by itself.
    """
    samples = None if ledger is None else ledger.pending()
    if not samples or any(_OURS in note for note in getattr(error, "__notes__", ())):
        return
    half = max(1, samples // 2)
    error.add_note(
        f"{_OURS} with {samples} samples at a time; this step was not made. Pass max_physical_batch_size={half} to "
        f"make_private_safe: batches are then delivered in parts of at most {half} samples, and released as wholes."
    )


def free() -> None:
    """Give back what a step that was given up has held; nothing refers to it any more."""
    give_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
