"""What is said about a step for which the memory did not suffice.

The error comes out of the script's own lines, which only the script can run again: the text says with which size.
"""

from __future__ import annotations

from dpfix.sampling.ledger import DrawLedger

_OURS = "dpfix: memory ran out"


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
