"""Opacus's privacy engine, whose checkpoints let a private training go on exactly, and which always knows its epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opacus import PrivacyEngine
from opacus.accountants.accountant import IAccountant
from torch import nn
from typing_extensions import override

from dpfix.errors import ArgumentError
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.randomness import Given
from dpfix.training import checkpoint
from dpfix.training.accounting import answer_of
from dpfix.training.pld_accountant import new_accountant
from dpfix.training.shared_state import refuse_files


class CheckpointingEngine(PrivacyEngine):
    """Opacus's privacy engine with checkpoints that hold everything a private training consists of.

    Its epsilon is that of :meth:`dpfix.PrivateTraining.get_epsilon`. Its secure mode needs no further package.

    Args:
        accountant: ``"prv"``, ``"rdp"`` or ``"gdp"``, which are Opacus's, or ``"pld"``, with ``dpfix[accounting]``.
        secure_mode: draw noise and batches with the operating system's cryptographic generator.

    Raises:
        ArgumentError: ``secure_mode`` is neither true nor false, or there is no accountant of that name.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        if not isinstance(secure_mode, bool):
            raise ArgumentError(
                f"secure_mode={secure_mode!r} is neither True nor False.",
                "It says whether noise and draws are cryptographic.",
                "Pass secure_mode=True or leave it out.",
                path="secure_mode",
            )
        counting = new_accountant(accountant)
        if not secure_mode:
            super().__init__()
            self.accountant = counting
            return
        self.accountant = counting  # Opacus's __init__ would ask for torchcsprng
        self.secure_mode, self.secure_rng, self.dataset = True, None, None

    @override
    def get_epsilon(self, delta: float, **accuracy: Any) -> float:
        return answer_of(self, delta, **accuracy)

    def _opacus_make_private(self, **arguments: Any) -> Any:
        return super().make_private(**arguments)

    @override
    def _prepare_data_loader(self, data_loader: Any, **options: Any) -> Any:
        if self.secure_mode and self.secure_rng is None:
            return data_loader  # draws by itself; Opacus would put a generator into its sampler
        return super()._prepare_data_loader(data_loader, **options)

    def save_checkpoint(  # type: ignore[override]
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        data_loader: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save a private training so that it goes on, from any step, exactly as it would have.

        With ``seed=`` in the call that includes noise and draws; without, these are new ones whenever the file is loaded.
        In the middle of an epoch, the next pass over the loader has the batches that were left. The file is there whole, or
        as it was before.

        Args:
            path: file name or binary file.
            module: the model, wrapped or not.
            optimizer: the private optimizer.
            data_loader: the private loader; needed if it has a generator of its own, for the workers.
            noise_scheduler: a scheduler of Opacus.
            grad_clip_scheduler: a scheduler of Opacus.
            checkpoint_dict: further entries of tensors and plain values.
            torch_save_kwargs: further arguments of ``torch.save``.

        Raises:
            CheckpointError: ``fully_shard`` was called on the model.
        """
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        more, saving = checkpoint_dict or {}, torch_save_kwargs or {}
        objects = checkpoint.Objects(module, optimizer, data_loader, schedulers)
        refuse_files(optimizer)
        checkpoint.save(self, path, objects, more, saving)

    def load_checkpoint(  # type: ignore[override]
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        data_loader: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go on with a private training that was saved; make the same call of ``make_private`` first.

        Args:
            path: file name or binary file.
            module: the model, wrapped or not.
            optimizer: the private optimizer.
            data_loader: the private loader.
            noise_scheduler: a scheduler of Opacus.
            grad_clip_scheduler: a scheduler of Opacus.
            module_load_dict_kwargs: ``{"strict": False}`` tolerates weights that do not fit.
            torch_load_kwargs: further arguments of ``torch.load``; ``weights_only`` is on unless it is turned off here.

        Returns:
            What the file holds.

        Raises:
            CheckpointError: the file is damaged, is no checkpoint, or does not fit; nothing is changed.
        """
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        strict = bool((module_load_dict_kwargs or {}).get("strict", True))
        loading = torch_load_kwargs or {}
        objects = checkpoint.Objects(module, optimizer, data_loader, schedulers)
        refuse_files(optimizer)
        return checkpoint.load(self, path, objects, strict, loading)


def check_given_engine(engine: Any, secure_mode: bool, accountant: Any) -> None:
    """An engine that is passed to the call goes with what else is asked for.

    Args:
        engine: what was passed.
        secure_mode: whether the call asks for it.
        accountant: the name that the call asks for, or ``None``.

    Raises:
        ArgumentError: the engine is another one.
    """
    counting = getattr(engine, "accountant", None)
    own = counting.mechanism() if isinstance(counting, IAccountant) else accountant  # another kind is refused later
    if accountant is not None and accountant != own:
        raise ArgumentError(
            f"accountant={accountant!r} with a privacy_engine whose accountant is {own!r}:",
            "one accountant counts the steps.",
            "Leave out one of them.",
            path="accountant",
        )
    if secure_mode and not getattr(engine, "secure_mode", True):  # what is no engine is told in a moment
        raise ArgumentError(
            "secure_mode=True with a privacy_engine that was made without it:",
            "its noise would not be cryptographic.",
            "Pass privacy_engine=dpfix.SafePrivacyEngine(secure_mode=True), or leave privacy_engine out.",
            path="secure_mode",
        )


def opacus_make_private(engine: PrivacyEngine) -> Callable[..., Any]:
    """Opacus's own ``make_private`` of an engine, which that of :class:`dpfix.SafePrivacyEngine` lies over."""
    return getattr(engine, "_opacus_make_private", engine.make_private)


def secure_source(engine: Any) -> Given | Cryptographic | None:
    """Where noise and draws come from in secure mode.

    Args:
        engine: an engine of Opacus's; one that has a cryptographic generator of its own keeps it.

    Returns:
        The source; ``None`` without secure mode.
    """
    if not engine.secure_mode:
        return None
    return Cryptographic() if engine.secure_rng is None else Given(engine.secure_rng)
