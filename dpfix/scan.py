"""Static facts about model, optimizer, loader and arguments. Pure: nothing is changed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.findings import Finding

OPACUS_MODES = ("hooks", "functorch", "ew")


@dataclass(frozen=True)
class Options:
    """What the call asks for, apart from the objects it works on.

    Attributes:
        grad_sample_mode: the mode asked for by name, or ``"auto"``.
        norm: what replaces BatchNorm: ``"group"``, ``"instance"`` or ``"layer"``.
        clipping: Opacus's clipping scheme.
        max_grad_norm: the clip norm, or one per parameter for per-layer clipping.
        poisson_sampling: whether the loader is to draw Poisson batches.
        no_grad_regions: whether module calls that no gradient comes back to run without a graph.
        cache: whether the order of the engines is remembered for the next run.
    """

    grad_sample_mode: str = "auto"
    norm: str = "group"
    clipping: str = "flat"
    max_grad_norm: Any = 1.0
    poisson_sampling: bool = True
    no_grad_regions: bool = True
    cache: bool = True

    @property
    def opacus_only(self) -> bool:
        """Whether an engine of Opacus was asked for by name."""
        return self.grad_sample_mode in OPACUS_MODES


@dataclass(frozen=True)
class Scan:
    """The objects of one call, with every module and every name it goes by.

    Attributes:
        module: the user's model.
        optimizer: the user's optimizer.
        data_loader: the user's loader.
        options: what was asked for.
    """

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader[Any]
    options: Options = field(default_factory=Options)

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

        Args:
            path: module path; empty for the root.

        Returns:
            For example ``BatchNorm3d at `down.0.norm` (in Encoder, unet.py:214)``.
        """
        return place(self.module, path)


def place(root: nn.Module, path: str) -> str:
    """Where a module stands, for messages.

    Args:
        root: the model.
        path: module path; empty for the root.

    Returns:
        Class, path, and class and source line of the module that holds it.
    """
    module = root.get_submodule(path)
    name = type(module).__name__
    if not path:
        return f"{name} (the root module{_source(module)})"
    owner, above = root, path.rpartition(".")[0]
    while above:
        candidate = root.get_submodule(above)
        if not type(candidate).__module__.startswith("torch.nn"):
            owner = candidate
            break
        above = above.rpartition(".")[0]
    return f"{name} at `{path}` (in {type(owner).__name__}{_source(owner)})"


def _source(module: nn.Module) -> str:
    cls = type(module)
    try:
        file = inspect.getsourcefile(cls)
        line = inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f", {os.path.basename(file)}:{line}" if file else ""


def run_rules(scan: Scan, rules: tuple[Any, ...]) -> tuple[tuple[Any, Finding], ...]:
    """Ask every rule what it finds.

    Args:
        scan: the objects of the call.
        rules: rule modules, in order.

    Returns:
        ``(rule, finding)`` pairs in the order of the rules.
    """
    return tuple((rule, finding) for rule in rules for finding in rule.find(scan))
