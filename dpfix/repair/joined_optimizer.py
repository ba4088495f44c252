"""One optimizer made of several that share the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from dpfix.errors import OptimizerError


class JoinedOptimizer(Optimizer):
    """Several optimizers over different parameters of one model, stepped together.

    A private training has one optimizer, because the gradient that a step releases is clipped and noised as a whole. This
    one has the parameter groups of all of them, in their order: a learning-rate scheduler of any of them keeps working, and
    so does one of the joined optimizer. Build it before the call, and replace the steps in the loop by one.

    Args:
        *optimizers: at least one, without a common parameter; each is stepped as it is.

    Raises:
        OptimizerError: none is given, something is no optimizer, or two hold the same parameter.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1))
    >>> first = torch.optim.SGD(net[0].parameters(), lr=0.1)
    >>> second = torch.optim.AdamW(net[1].parameters(), lr=0.01)
    >>> [group["lr"] for group in JoinedOptimizer(first, second).param_groups]
    [0.1, 0.01]
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        for one in optimizers:
            if not isinstance(one, Optimizer):
                raise OptimizerError(
                    f"JoinedOptimizer was given a {type(one).__name__}, not a torch.optim.Optimizer.",
                    help="Pass the optimizers themselves: JoinedOptimizer(first, second).",
                    path="optimizers",
                )
        held = [id(p) for one in optimizers for group in one.param_groups for p in group["params"]]
        if not held or len(held) > len(set(held)):
            raise OptimizerError(
                "JoinedOptimizer was given " + ("one parameter twice:" if held else "no parameter:"),
                "one noisy gradient moves every parameter once.",
                "Give each trainable parameter to one of the optimizers.",
                path="optimizers",
            )
        self.optimizers = optimizers
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        for one in optimizers:
            self.state.update(one.state)
        self._share()

    def _share(self) -> None:
        """Let the optimizers work on the groups and the state of this one."""
        first = 0
        for one in self.optimizers:
            last = first + len(one.param_groups)
            one.param_groups, one.state = self.param_groups[first:last], self.state
            first = last

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for one in self.optimizers:
            one.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
