"""The same tuning for a private and an ordinary training: one grid, one validation part, the best of each side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SIDES = ("private", "not private")


@dataclass(frozen=True)
class Setting:
    """What is chosen for one side."""

    lr: float
    epochs: int


def tune(train: Callable[[str, float], Mapping[int, float]], rates: Sequence[float]) -> dict[str, Setting]:
    """Train both sides with every learning rate, and print a table of what the validation part says.

    Args:
        train: from a side and a learning rate to the validation Dice by number of epochs.
        rates: the learning rates.

    Returns:
        The setting with the highest validation Dice, of each side.
    """
    found: dict[str, dict[Setting, float]] = {side: {} for side in SIDES}
    for lr in rates:
        for side in SIDES:
            dice = train(side, lr)
            if not any(found.values()):
                titles = "".join(f" {epochs} epochs |" for epochs in dice)
                print(f"| validation Dice | learning rate |{titles}\n|---|---|{'---|' * len(dice)}", flush=True)
            found[side] |= {Setting(lr, epochs): value for epochs, value in dice.items()}
            print(f"| {side} | {lr:g} |{''.join(f' {value:.3f} |' for value in dice.values())}", flush=True)
    chosen = {side: max(settings, key=settings.__getitem__) for side, settings in found.items()}
    print("\n" + "\n".join(f"chosen, {side}: learning rate {s.lr:g}, {s.epochs} epochs" for side, s in chosen.items()))
    return chosen
