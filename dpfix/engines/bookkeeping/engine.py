"""The engine: which rule, or other forward, every module of a model gets."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from dpfix.engines.base import Engine, Verdict, batches_of_tensors
from dpfix.engines.bookkeeping.composed import COMPOSED
from dpfix.engines.bookkeeping.convolution import Convolution
from dpfix.engines.bookkeeping.embedding import Embedding
from dpfix.engines.bookkeeping.forward import CompositeForward, LayerForward
from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.engines.bookkeeping.layer_rule import LayerRule
from dpfix.engines.bookkeeping.linear import Linear
from dpfix.engines.bookkeeping.norms import NORMS
from dpfix.engines.bookkeeping.own_parameters import OwnParametersForward, can_divert
from dpfix.engines.bookkeeping.prelu import PReLU
from dpfix.engines.bookkeeping.recurrent import CellForward, RecurrentForward
from dpfix.engines.bookkeeping.root import RootForward
from dpfix.engines.bookkeeping.shared_outputs import users_of_shared
from dpfix.engines.bookkeeping.unknown_module import UnknownModuleForward
from dpfix.errors import ArgumentError
from dpfix.instrument.parameter_uses import MARK, used_in
from dpfix.layout.calls import LayerLayout
from dpfix.plan import Plan

COMPOSITE: tuple[type[CompositeForward], ...] = (RecurrentForward, CellForward, *COMPOSED)
"""The layers that are made of several; everything else goes through ``vmap``."""


class Bookkeeping(Engine):
    """The engine: which layers it knows, and which of them are the user's."""

    name = "bookkeeping"
    opacus_mode = "no_op"
    materialises = False
    takes_shards = True

    def __init__(self) -> None:
        self._own: tuple[LayerRule, ...] = (Linear(), Convolution(), Embedding(), *NORMS, PReLU())
        self._registered: OrderedDict[int, LayerRule] = OrderedDict()

    def register(self, rule: LayerRule) -> RemovableHandle:
        """Let a rule compute and account for the layers that it accepts, from the next private training on.

        Without it a layer that the engine does not know runs one sample at a time under ``vmap``, which is right and
        slower. A rule is audited on every model like everything else: a wrong one is refused.

        Args:
            rule: the rule. It comes before the engine's own, and after those that were registered later.

        Returns:
            A handle; ``remove()``, or leaving a ``with`` block around it, takes the rule back. A training that has
            begun keeps it.

        Raises:
            ArgumentError: ``rule`` is no layer rule.
        """
        if not isinstance(rule, LayerRule):
            raise ArgumentError(
                f"register() was given {rule!r}, not an instance of LayerRule.",
                help="Pass an instance of a subclass: register(MyRule()).",
                path="rule",
            )
        handle = RemovableHandle(self._registered)
        self._registered[handle.id] = rule
        return handle

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """The layers that are one rule; the first one that accepts a module counts."""
        return (*reversed(self._registered.values()), *self._own)

    @property
    @override
    def remembered(self) -> bool:
        return not self._registered

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        return batches_of_tensors(record)

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> BookkeepingHandle:
        handle = BookkeepingHandle(module, plan)
        modules = dict(module.named_modules())
        called = {layer.path for layer in plan.layers}
        for users in (users_of_shared(modules, plan.layers), dict[str, str]()):  # diverted, or given to each sample
            rules, expanded = assign(self.rules, modules, called, dict(plan.elsewhere), users)
            expanded = only_used(modules, plan.layers, rules, expanded)
            made = composites(modules, called, expanded)
            outside = {p: own for p, own in expanded.items() if p not in made}
            diverted = on_the_batch(modules, plan, outside, {**rules, **made})
            if users.keys() <= {name.rpartition(".")[0] for own in diverted.values() for name in own}:
                break
        for path, rule in rules.items():
            handle.put_in(LayerForward(handle, modules[path], path, rule))
        for path, kind in made.items():
            handle.put_in(kind(handle, modules[path], path))
            del expanded[path]
        for path, parameters in diverted.items():
            handle.put_in(OwnParametersForward(handle, modules[path], path, parameters))
            del expanded[path]
        for path in expanded:
            inside = [p for p in expanded if not path or p == path or p.startswith(f"{path}.")]
            parameters = {name: p for place in inside for name, p in expanded[place].items()}
            handle.put_in(UnknownModuleForward(handle, modules[path], path, parameters))
        handle.put_in(RootForward(handle, module))
        return handle


def assign(
    known: Sequence[LayerRule],
    modules: dict[str, nn.Module],
    called: set[str],
    elsewhere: Mapping[str, Sequence[str]],
    users: Mapping[str, str] | None = None,
) -> tuple[dict[str, LayerRule], dict[str, dict[str, nn.Parameter]]]:
    """Decide for every module that owns trainable parameters how it is accounted for.

    A parameter whose own module is never called (the output projection inside ``nn.MultiheadAttention``, a
    ``ParameterList``) belongs to the nearest module around it that is; one that is used outside of its own module, to
    the nearest module around all uses.

    Args:
        known: the layers that are one rule.
        called: paths of modules whose calls the probe has shown.
        elsewhere: paths of the modules that use a parameter which is not theirs, by parameter name.
        users: the module around that uses what a module makes, for some modules, by path.

    Returns:
        Rules by path, and the parameters to expand by path of the module that uses them.
    """
    rules: dict[str, LayerRule] = {}
    expanded: dict[str, dict[str, nn.Parameter]] = {}
    used, users = _uses(modules, elsewhere), users or {}
    for path, module in modules.items():
        own = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
        if not own:
            continue
        layer = path.partition("parametrizations")[0].rstrip(".") if "parametrizations" in path.split(".") else path
        rule = next((r for r in known if r.accepts(modules[layer]) and _known(modules[layer], r)), None)
        places = {place for p in own.values() for place in used.get(id(p), ())}
        if rule is not None and layer in called and not places and layer not in users:
            rules[layer] = rule
            continue
        user = _around([users.get(layer, layer), *places])
        while user and user not in called:
            user = user.rpartition(".")[0]
        expanded.setdefault(user, {}).update({f"{path}.{n}" if path else n: p for n, p in own.items()})
    for path in expanded:
        rules.pop(path, None)
    return rules, expanded


def only_used(
    modules: dict[str, nn.Module],
    layers: Sequence[LayerLayout],
    rules: Mapping[str, LayerRule],
    expanded: Mapping[str, Mapping[str, nn.Parameter]],
) -> dict[str, dict[str, nn.Parameter]]:
    """Leave out what a module holds beside a layer that uses it: a tied weight, the bias of a decoder.

    Args:
        layers: the calls that the probe has shown, and the functions on parameters.
        rules: the layers that are accounted for, by path.
        expanded: parameters by path of the module that uses or holds them.

    Returns:
        The others.
    """
    names = {id(p): name for name, p in modules[""].named_parameters()}
    calls = Counter(layer.path for layer in layers if MARK not in layer.path)
    uses = Counter(part for layer in layers if MARK in layer.path for part in used_in(layer.path))

    def used(p: nn.Parameter) -> bool:
        owners = [path for path in rules if any(p is own for own in modules[path]._parameters.values())]
        return not owners or uses[names[id(p)]] != sum(calls[path] for path in owners)

    found = {path: {name: p for name, p in own.items() if used(p)} for path, own in expanded.items()}
    return {path: own for path, own in found.items() if own}


def on_the_batch(
    modules: dict[str, nn.Module],
    plan: Plan,
    expanded: Mapping[str, Mapping[str, nn.Parameter]],
    inside: Mapping[str, LayerRule | type[CompositeForward]],
) -> dict[str, dict[str, nn.Parameter]]:
    """Which modules can run on the whole batch but for the functions on some parameters.

    Args:
        expanded: parameters by path of the module that uses them.
        inside: what computes the layers that are known, by path.

    Returns:
        These parameters by name, by path of the module.
    """
    names = {id(p): name for name, p in modules[""].named_parameters()}
    known = {path: {names[id(p)]: p for p in own.values()} for path, own in expanded.items()}
    found = {path: own for path, own in known.items() if can_divert(own, plan.layers)}
    for layer in plan.layers:  # what is made of a parameter and given back would be used where nobody sees it
        if layer.path and any(dim is None for _, dim in layer.output):  # the model itself returns its loss that way
            found.pop(layer.path, None)
    mapped = {layer.path for layer in plan.layers if not _on_the_batch(modules, layer, inside, known)}
    elsewhere = {name for name, _ in plan.elsewhere}
    for path in sorted(found, key=len, reverse=True):
        below = {p for p in {*known, *mapped} if p != path and (not path or p.startswith(f"{path}."))}
        inner = {p for p in below & {*known} if p not in found}  # which are mapped, with all that is in them
        # What only a mapped module can call stays inside one; so does a parameter that one inside uses.
        if any(not any(m == p or m.startswith(f"{p}.") for p in inner) for m in below & mapped) or (
            below - {*found} and elsewhere & {*found[path]}
        ):
            del found[path]
    outside = [p for p in known if p not in found]
    return {p: own for p, own in found.items() if not any(not o or p.startswith(f"{o}.") for o in outside)}


def _on_the_batch(
    modules: dict[str, nn.Module],
    call: LayerLayout,
    inside: Mapping[str, LayerRule | type[CompositeForward]],
    others: Collection[str],
) -> bool:
    """Whether a call of a layer that is accounted for has its samples where a whole batch has them."""
    layer = inside.get(call.path)
    if layer is None and call.path not in others:
        return True
    dims = [dim for _, dim in call.inputs if dim is not None]
    if isinstance(layer, type):
        return bool(dims) and not call.problem and layer.on_the_batch(modules[call.path], dims)
    return bool(dims) and not call.problem and (layer is None or layer.features is not None or dims[0].dim == 0)


def composites(
    modules: dict[str, nn.Module], called: set[str], expanded: Mapping[str, Mapping[str, nn.Parameter]]
) -> dict[str, type[CompositeForward]]:
    """Which of the modules that no single rule computes are known to be made of several.

    Args:
        called: paths of modules whose calls the probe has shown.
        expanded: parameters by path of the module that uses them.

    Returns:
        What replaces its forward, by path.
    """
    found = {}
    for path, parameters in expanded.items():
        kind = next((k for k in COMPOSITE if k.accepts(modules[path])), None)
        complete = {id(p) for p in parameters.values()} == {
            id(p) for p in modules[path].parameters() if p.requires_grad
        }
        if kind is not None and path in called and complete:
            found[path] = kind
    return found


def _known(module: nn.Module, rule: LayerRule) -> bool:
    """Whether a rule knows all that a layer's trained parameters make: as they are, or a weight computed from them."""
    own = {n for n, p in module._parameters.items() if p is not None and p.requires_grad}
    hooked = any(isinstance(h, (WeightNorm, SpectralNorm)) for h in module._forward_pre_hooks.values())
    computed = set(module.parametrizations) if parametrize.is_parametrized(module) else set()  # type: ignore[arg-type]
    return (own <= {*rule.parameters} and computed <= {"weight", "bias"}) or (
        hooked and own <= {"weight_g", "weight_v", "weight_orig", "bias"}
    )


def _uses(modules: dict[str, nn.Module], elsewhere: Mapping[str, Sequence[str]]) -> dict[int, list[str]]:
    """All places that use a parameter which is used elsewhere, by the parameter's id: its owners, and the others."""
    root = modules[""]
    ids = {id(root.get_parameter(name)): list(places) for name, places in elsewhere.items()}
    for path, module in modules.items():
        for p in module._parameters.values():
            if id(p) in ids:
                ids[id(p)].append(path)
    return ids


def _around(paths: Sequence[str]) -> str:
    """The module around several."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
