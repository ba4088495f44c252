"""What one training step on the probe does: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpfix.instrument.call_sites import CallSite
from dpfix.instrument.gradients import Gradients
from dpfix.instrument.module_state import Key
from dpfix.layout.calls import CallLayout, LayerLayout
from dpfix.observe import double_activation
from dpfix.observe.recorder import RecordedCall, Site
from dpfix.plan import Plan
from dpfix.report.finding import Finding


@dataclass(frozen=True)
class Run:
    """One training step on the plain model.

    Attributes:
        loss: value of the loss.
        gradients: sketch of the gradient of every trainable parameter, by name; zeros where none arrived. They can be added up
            and compared (:func:`dpfix.instrument.gradients.sketched`).
        norms: Euclidean norms of the gradients themselves.
        used: names of the parameters that a gradient reached.
        calls: calls of the root and of the modules that own parameters, by path.
        written: state that the step changed, with its new value.
        random_modules: paths of modules inside which something random was drawn.
        low_precision: whether half precision was used.
        drew: whether something random was drawn, in the model or in the loss.
        repeated: activations of what has already gone through one; looked for where details are written down.
        drawn: how many operations of torch drew something.
        decides: whether one of them drew so few numbers that a branch may depend on them.
        outside: 0 if Python's and NumPy's generators are where they were; else a number that is the same for runs that drew
            alike.
        drawn_outside: how many draws from these generators there were, fixed or not, as far as they were seen.
    """

    loss: float
    gradients: Gradients
    norms: Mapping[str, float]
    used: frozenset[str]
    calls: Mapping[str, list[RecordedCall]]
    written: dict[Key, Any]
    random_modules: frozenset[str]
    low_precision: bool
    drew: bool
    repeated: tuple[double_activation.Repeated, ...] = ()
    drawn: int = 0
    decides: bool = False
    outside: int = 0
    drawn_outside: int = 0

    @property
    def drew_outside(self) -> bool:
        """Whether anything was drawn from Python's or NumPy's generators."""
        return bool(self.outside or self.drawn_outside)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module in the step on the whole probe.

    Attributes:
        path: path of the module.
        number: how many calls of this module came before.
        shapes: shapes of the output tensors.
        reached: whether a gradient came back to one of them.
        site: which call of the step it is; ``None`` under ``no_grad``.
        carries_graph: whether an output requires gradient.
        entered: moment of the call.
        left: moment of the return.
    """

    path: str
    number: int
    shapes: tuple[tuple[int, ...], ...]
    reached: bool
    site: CallSite | None
    carries_graph: bool
    entered: int
    left: int


@dataclass(frozen=True)
class StepRecord:
    """What one training step on the probe does.

    Attributes:
        together: the step on all samples.
        alone: the step on every sample alone: the batch-of-one reference.
        calls: how each call of the model carries its samples.
        layout_problem: why that could not be told, or empty.
        layers: how each call of a module that owns trainable parameters, and of a function on such parameters
            (:mod:`dpfix.instrument.parameter_uses`), carries its samples.
        modules: every module call, in order.
        unused: trainable parameters that no gradient reached in any run.
        functional: trainable parameters used outside their own module, with the first line.
        elsewhere: paths of the modules that use them there, by name.
        several: trainable parameters whose module is called more than once, or that have several names.
        cuts: where a graph was cut, and the numbers (in ``modules``) of the calls that the cut tensor comes from.
        in_place: where the output of a module was overwritten.
        needs_workarounds: whether forward does what ``vmap`` does wrong or refuses; see :class:`StepLog`.
        constant_writes: state changed by the step in a way that depends on no sample.
        sample_writes: state changed by the step in a way that depends on the samples.
        scratch: attributes of that kind which every step overwrites before it reads them; not in ``sample_writes``.
        counts: rows of every sample in the model's inputs, where these are not the same for all.
    """

    together: Run
    alone: tuple[Run, ...]
    calls: tuple[CallLayout, ...]
    layout_problem: str
    layers: tuple[LayerLayout, ...]
    modules: tuple[ModuleCall, ...]
    unused: tuple[str, ...]
    functional: Mapping[str, str]
    elsewhere: tuple[tuple[str, tuple[str, ...]], ...]
    several: tuple[str, ...]
    cuts: Mapping[Site, frozenset[int]]
    in_place: tuple[Site, ...]
    needs_workarounds: bool
    constant_writes: tuple[str, ...]
    sample_writes: tuple[str, ...]
    scratch: tuple[Key, ...] = ()
    counts: tuple[int, ...] = ()

    def beside(self, so_far: Plan) -> StepRecord:
        """The same, in a training that has used other parts of the model: these go on being trained."""
        paths, forms = {layer.path for layer in self.layers}, {call.signature for call in self.calls}
        named = {name for name, _ in self.elsewhere}
        return replace(
            self,
            unused=tuple(name for name in self.unused if name in so_far.frozen_parameters),
            layers=(*self.layers, *(layer for layer in so_far.layers if layer.path not in paths)),
            calls=(*self.calls, *(call for call in so_far.calls if call.signature not in forms)),
            elsewhere=(*self.elsewhere, *(use for use in so_far.elsewhere if use[0] not in named)),
        )

    @property
    def detached(self) -> tuple[Site, ...]:
        """Where a graph was cut."""
        return tuple(self.cuts)

    @property
    def random_modules(self) -> frozenset[str]:
        """Paths of modules inside which something random was drawn."""
        return frozenset().union(self.together.random_modules, *(run.random_modules for run in self.alone))

    @property
    def low_precision(self) -> bool:
        """Whether half precision was used anywhere."""
        return self.together.low_precision or any(run.low_precision for run in self.alone)

    @property
    def rows_per_sample(self) -> int:
        """Largest number of rows that one sample has in an input of the model."""
        rows = [dim.rows for call in self.calls for _, dim in call.inputs if dim is not None]
        return max(rows, default=1)


def several_rows(model: str, record: StepRecord) -> list[Finding]:
    """Advice about samples that enter a model as several rows, or as different numbers of them."""
    if record.counts:
        fact = f"samples enter {model} as different numbers of rows ({min(record.counts)} to {max(record.counts)} in the probe)."
    elif record.rows_per_sample > 1:
        fact = f"every sample enters {model} as {record.rows_per_sample} rows."
    else:
        return []
    why = "the rows of a sample are clipped together, and counted once: the privacy unit is the sample."
    return [Finding.advice("DPF024", fact, why, path="data_loader")]
