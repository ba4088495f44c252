"""A loader that a framework's trainer owns: the loop iterates over the trainer's, not over what a call returns."""

from __future__ import annotations

from typing import Any


def replace_loader(module: Any, given: Any, private: Any) -> bool:
    """Let the trainer of a model deliver the private loader's draws in place of the given loader's batches.

    Lightning's ``Trainer`` holds the loader, and ``make_private`` is called in ``configure_optimizers``, from where only an
    optimizer comes back. No package is imported for this; a model that has no such trainer is left alone.

    Args:
        module: the model that is trained.
        given: the loader of the call.
        private: the private one.

    Returns:
        Whether a trainer had the loader.
    """
    loop = getattr(vars(module).get("_trainer"), "fit_loop", None)
    owner = getattr(loop, "_combined_loader", None)
    loaders = getattr(owner, "flattened", ())
    if not any(loader is given for loader in loaders):
        return False
    owner.flattened = [private if loader is given else loader for loader in loaders]  # type: ignore[union-attr]
    iter(loop._data_fetcher)  # type: ignore[union-attr]  # the first epoch's iterator was made with the loader
    return True
