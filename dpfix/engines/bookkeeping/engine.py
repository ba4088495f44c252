"""The engine: which rule or stand-in every module of a model gets."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from dpfix.engines.base import Verdict
from dpfix.engines.bookkeeping.calls import Rule
from dpfix.engines.bookkeeping.convolution import Convolution
from dpfix.engines.bookkeeping.embedding import Embedding
from dpfix.engines.bookkeeping.expanded import ExpandedStandIn
from dpfix.engines.bookkeeping.handle import BookkeepingHandle, RootStandIn
from dpfix.engines.bookkeeping.layers import LayerStandIn
from dpfix.engines.bookkeeping.linear import Linear
from dpfix.engines.bookkeeping.norms import FixedNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from dpfix.engines.bookkeeping.prelu import PReLU
from dpfix.engines.bookkeeping.recurrent import LSTMStandIn, known_lstm
from dpfix.plan import Plan

RULES: tuple[Rule, ...] = (
    Linear(),
    Convolution(),
    Embedding(),
    GroupNorm(),
    InstanceNorm(),
    LayerNorm(),
    RMSNorm(),
    FixedNorm(),
    PReLU(),
)
"""The layers that are known; everything else goes through ``vmap``."""


class Bookkeeping:
    """The engine."""

    name = "bookkeeping"
    opacus_mode = "no_op"

    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Works wherever the probe showed which rows belong to which sample.

        Args:
            module: the repaired model.
            record: what the probe showed.

        Returns:
            The verdict.
        """
        return Verdict(record.layout_problem)

    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> BookkeepingHandle:
        """Put stand-ins in the place of the layers' forwards.

        Args:
            module: the repaired model.
            plan: how the calls of the model and of its layers carry their samples.
            prepared: not used; Opacus prepares nothing for this engine.

        Returns:
            The handle.
        """
        handle = BookkeepingHandle(module, plan)
        modules = dict(module.named_modules())
        called = {layer.path for layer in plan.layers}
        rules, expanded = assign(modules, called)
        for path, rule in rules.items():
            handle.put_in(LayerStandIn(handle, modules[path], path, rule))
        for path in expanded:
            inside = [p for p in expanded if not path or p == path or p.startswith(f"{path}.")]
            parameters = {name: p for place in inside for name, p in expanded[place].items()}
            if known_lstm(modules[path]) and len(inside) == 1 and path in called:
                handle.put_in(LSTMStandIn(handle, modules[path], path))
            else:
                handle.put_in(ExpandedStandIn(handle, modules[path], path, parameters))
        handle.put_in(RootStandIn(handle, module))
        return handle


def assign(
    modules: dict[str, nn.Module], called: set[str]
) -> tuple[dict[str, Rule], dict[str, dict[str, nn.Parameter]]]:
    """Decide for every module that owns trainable parameters how it is accounted for.

    A parameter whose own module is never called (the output projection inside ``nn.MultiheadAttention``, a
    ``ParameterList``, the original of a parametrised weight) belongs to the nearest module around it that is.

    Args:
        modules: the modules by path.
        called: paths of modules whose calls the probe has shown.

    Returns:
        Rules by path, and the parameters to expand by path of the module that uses them.
    """
    rules: dict[str, Rule] = {}
    expanded: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in modules.items():
        own = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
        if not own:
            continue
        rule = next((r for r in RULES if r.accepts(module)), None)
        known = own.keys() <= {"weight", "bias"} and not parametrize.is_parametrized(module)
        if rule is not None and known and path in called:
            rules[path] = rule
            continue
        user = path
        while user and (user not in called or "parametrizations" in user.split(".")):
            user = user.rpartition(".")[0]
        expanded.setdefault(user, {}).update({f"{path}.{n}" if path else n: p for n, p in own.items()})
    for path in expanded:
        rules.pop(path, None)
    return rules, expanded
