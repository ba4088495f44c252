"""Static facts about model, optimizer, loader and arguments. Pure: nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.instrument.batch_norm_calls import Mixing
from dpfix.instrument.source import describe_module
from dpfix.sampling.ranks import Ranks
from dpfix.scan.options import PerformanceOptions, PrivacyOptions


@dataclass(frozen=True)
class Scan:
    """The objects of one call, with every module and every name it goes by.

    Attributes:
        module: the user's model.
        optimizer: the user's optimizer.
        data_loader: the user's loader.
        privacy: what was asked for that decides what is released.
        performance: what was asked for that decides how it is computed.
        mixing: what a run has shown of modules that call ``batch_norm``, by path.
        ranks: the processes that train together, where the module does not tell; ``None`` where it does.
    """

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader[Any]
    privacy: PrivacyOptions
    performance: PerformanceOptions
    mixing: Mapping[str, Mixing] = field(default_factory=dict)
    ranks: Ranks | None = None

    @cached_property
    def aliases(self) -> Mapping[nn.Module, tuple[str, ...]]:
        """Every module with all paths it is registered under."""
        found: dict[nn.Module, list[str]] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            found.setdefault(module, []).append(path)
        return {module: tuple(paths) for module, paths in found.items()}

    @cached_property
    def parameter_names(self) -> Mapping[nn.Parameter, str]:
        """The first name of every parameter of the model."""
        return {p: name for name, p in self.module.named_parameters()}

    def modules(self, *kinds: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Modules of some classes, each once, under its first path.

        Args:
            *kinds: classes; all modules if none is given.

        Yields:
            ``(path, module)`` pairs.
        """
        for module, paths in self.aliases.items():
            if not kinds or isinstance(module, kinds):
                yield paths[0], module

    def place(self, path: str) -> str:
        """Where a module stands, for messages.

        Returns:
            For example ``BatchNorm3d at `down.0.norm` (in Encoder, unet.py:214)``.
        """
        return describe_module(self.module, path)
