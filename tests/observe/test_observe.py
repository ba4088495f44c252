"""What is written down about a training step, and that nothing else is left of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dpfix
from dpfix.instrument import pytree
from dpfix.layout.calls import LayerLayout
from dpfix.layout.sample_dim import SampleDim
from dpfix.observe import probe
from dpfix.observe.record import StepRecord
from dpfix.observe.recorder import StepLog, recorder
from dpfix.observe.run import observe
from dpfix.observe.training_step import Subject, TrainingStep
from tests.cases import classify
from tests.helpers import generators_unchanged
from tests.reference import Step


def items(*shape: int, samples: int = 4) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=draw), i % 3) for i in range(samples)]


def words(length: int = 5) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 7, (length,), generator=draw), i % 3) for i in range(4)]


def record(
    model: nn.Module, data: list[Any] | None = None, step: Step = classify, collate: Any = default_collate
) -> StepRecord:
    """Observe a model; the generators are looked at on the way."""
    loader: Any = DataLoader(items(6) if data is None else data, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    samples = probe.take(loader)
    with generators_unchanged():
        return observe(Subject(model.train(), TrainingStep(step, "test", loss_known=True)), samples)


def line(thing: Any, text: str) -> str:
    """``file:line`` of the first line of a class or function that holds a text."""
    source, first = inspect.getsourcelines(thing)
    number = next(i for i, code in enumerate(source) if text in code)
    return f"test_observe.py:{first + number}"


def layer(found: StepRecord, path: str, number: int = 0) -> LayerLayout:
    (call,) = (c for c in found.layers if c.path == path and c.number == number)
    assert not call.problem
    return call


def dims(layout: Any) -> list[SampleDim | None]:
    return [dim for _, dim in layout]


class Plain(nn.Module):
    """Two layers; other models of this file change one line of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


# ------------------------------------------------------------------ what happened


def test_a_plain_step_has_nothing_special() -> None:
    found = record(Plain())
    assert [(c.path, c.number, c.shapes, c.reached) for c in found.modules] == [
        ("a", 0, ((4, 6),), True),
        ("b", 0, ((4, 3),), True),
        ("", 0, ((4, 3),), True),
    ]
    assert not (found.unused or found.functional or found.several or found.detached or found.in_place)
    assert not (found.constant_writes or found.sample_writes or found.random_modules or found.layout_problem)
    assert found.rows_per_sample == 1 and not found.low_precision
    assert [len(found.alone), len(found.together.gradients)] == [4, 4]


def test_gradients_are_those_of_ordinary_autograd() -> None:
    model = Plain().double()
    data = [(x.double(), y) for x, y in items(6)]
    found = record(model, data)
    samples = probe.take(DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    for run, batch in zip((found.together, *found.alone), (samples.batch, *samples.singles), strict=True):
        wanted = torch.autograd.grad(classify(model, batch), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(run.gradients[name], g)


class Detached(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        target = self.a(x + 1).detach()
        return self.b(torch.tanh(h) + target)


class DataOfModule(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + self.a(x).data)


@pytest.mark.parametrize(
    ("model", "text", "what"), [(Detached, ".detach()", "detach"), (DataOfModule, ".data)", ".data")]
)
def test_places_where_the_graph_is_cut(model: type[nn.Module], text: str, what: str) -> None:
    (site,) = record(model()).detached
    assert (site.module, site.line, site.what) == ("", line(model, text), what)
    assert str(site) == f"{what} at {site.line}"


def test_cut_in_the_step_and_inside_a_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x * 2).detach()

    def step(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]) + (out - out.detach()).square().mean()

    found = record(nn.Sequential(nn.Linear(6, 3), Inner()), step=step).detached
    assert [(s.module, s.line) for s in found] == [
        ("1", line(Inner, "x * 2")),
        ("", line(test_cut_in_the_step_and_inside_a_module, "out - out.detach")),
    ]
    assert str(found[0]).endswith("in `1`")


def test_detaching_what_has_no_graph_is_no_cut() -> None:
    class Input(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    assert record(Input()).detached == ()


class Added(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h += x
        return self.b(torch.tanh(h))


class Multiplied(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(2)
        return self.b(torch.tanh(h))


class Rectified(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x), inplace=True))


class Written(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 0] = 1.0
        return self.b(torch.tanh(h))


class ThroughAView(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 2:].zero_()
        return self.b(torch.tanh(h))


@pytest.mark.parametrize(
    ("model", "text"),
    [(Added, "+="), (Multiplied, "mul_"), (Rectified, "inplace"), (Written, "= 1.0"), (ThroughAView, "zero_")],
)
def test_places_where_the_output_of_a_layer_is_overwritten(model: type[nn.Module], text: str) -> None:
    found = record(model())
    assert {(s.module, s.line) for s in found.in_place} == {("", line(model, text))}


def test_activation_modules_that_overwrite_are_seen() -> None:
    found = record(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    assert found.together.used == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(c.reached for c in found.modules)


def test_overwriting_a_tensor_of_its_own_is_not_reported() -> None:
    class Own(Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x)
            h += x
            return super().forward(h)

    assert record(Own()).in_place == ()


class ThroughAViewOfAView(nn.Module):
    """Torch 2.13 crashes if a hook is put on such a tensor before its ``grad_fn`` was looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(6, 6), Moved(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Unflatten(1, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.identity(x).transpose(1, 2)
        out[:, 0] += 0.1
        out *= 1.5
        out[:, 0] += 0.1
        return out.flatten(1)


def test_views_of_views_may_be_overwritten() -> None:
    found = record(nn.Sequential(nn.Linear(6, 6), Overwrites(), nn.Flatten(), nn.Linear(6, 3)))
    assert found.unused == ()
    assert record(ThroughAViewOfAView()).unused == ()


class Overwrites(nn.Module):
    """Overwrites a part of another module's output that is a view, and returns the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.view = Transposes()

    def forward(self, x: Tensor) -> Tensor:
        out = self.view(x)
        out *= 1.5
        out[:, 0] += 0.1
        return out


class Transposes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).unflatten(1, (2, 3)).transpose(1, 2)


# ------------------------------------------------------------------ uses of parameters


class WeightAgain(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight.t()))


def test_use_of_a_parameter_outside_its_module() -> None:
    found = record(WeightAgain())
    assert dict(found.functional) == {"a.weight": line(WeightAgain, "self.a.weight")}


def test_penalty_in_the_step_is_a_use_outside_the_module() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return classify(model, batch) + 0.1 * model.b.bias.square().sum()

    found = record(Plain(), step=step)
    assert found.functional["b.bias"] == line(test_penalty_in_the_step_is_a_use_outside_the_module, "model.b.bias")


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.LSTM(6, 3, batch_first=True), Last()),
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), Last()),
        lambda: nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), Last()),
    ],
    ids=("lstm", "weight norm", "spectral norm"),
)
def test_use_by_the_own_module_is_none_outside(model: Callable[[], nn.Module]) -> None:
    assert record(model(), items(2, 6)).functional == {}


class Last(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return (x[0] if isinstance(x, tuple) else x)[:, -1]


def test_parameter_lists_belong_to_the_module_that_holds_them() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(6, 3)])
            self.named = nn.ParameterDict({"bias": torch.zeros(3)})

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0] + self.named["bias"]

    found = record(Lists())
    assert found.functional == {} and found.unused == ()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))[:, :3]


class Repeated(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.a(x)))


class TwoNames(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleList([self.a])


@pytest.mark.parametrize(
    ("model", "data", "several"),
    [
        (Tied, words(), ("words.weight",)),
        (Repeated, items(6), ("a.weight", "a.bias")),
        (TwoNames, items(6), ("a.weight", "a.bias")),
    ],
)
def test_parameters_with_several_uses(model: type[nn.Module], data: list[Any], several: tuple[str, ...]) -> None:
    assert record(model(), data).several == several


def test_calls_are_numbered() -> None:
    calls = [(c.path, c.number) for c in record(Repeated()).modules]
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("", 0)]


class Spare(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.cut = nn.Linear(6, 2), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.spare(x)
        return super().forward(x + self.cut(x).detach())


def test_parameters_without_gradient_and_calls_it_does_not_reach() -> None:
    found = record(Spare())
    assert found.unused == ("spare.weight", "spare.bias", "cut.weight", "cut.bias")
    assert {c.path: c.reached for c in found.modules} == {
        "spare": False, "cut": False, "a": True, "b": True, "": True,
    }  # fmt: skip


def test_branches_that_only_some_samples_take_are_used() -> None:
    class Branches(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1 and bool(x.sum() > 0):
                return self.b(torch.tanh(self.a(x)))
            return self.b(x)

    assert record(Branches()).unused == ()


def test_layers_dropped_at_random_are_used() -> None:
    class Sometimes(Plain):
        def forward(self, x: Tensor) -> Tensor:
            keep = bool(torch.rand(()) < 2)  # what a fixed draw would decide is not what training does
            return self.b(torch.tanh(self.a(x)) if keep else x)

    found = record(Sometimes())
    assert found.unused == () and "" in found.random_modules


def test_random_modules_are_named() -> None:
    found = record(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Dropout(0.0), nn.Linear(6, 3)))
    assert found.random_modules == {"", "1"}


class SometimesRandom(Plain):
    """Drops at random what comes of large samples alone; the first sample of the probe is none."""

    limit = 1.5

    def forward(self, x: Tensor) -> Tensor:
        y, large = self.a(x), x.amax(1, keepdim=True) > self.limit
        return self.b(torch.where(large, F.dropout(y), y) if large.any() else y)


def test_randomness_that_the_first_sample_does_not_show_is_fixed_in_the_others() -> None:
    given = items(6)
    largest = [float(x.max()) for x, _ in probe.take(DataLoader(given, batch_size=4)).items]  # type: ignore[arg-type]
    assert largest[0] < SometimesRandom.limit < max(largest)
    found = record(SometimesRandom().double(), [(x.double(), y) for x, y in given])
    assert found.together.drew and not found.alone[0].drew and any(run.drew for run in found.alone)
    for name, gradient in found.together.gradients.items():
        assert torch.allclose(4 * gradient, sum(run.gradients[name] for run in found.alone), atol=1e-12)  # type: ignore[arg-type]


def test_half_precision_is_seen() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[0])
        return F.cross_entropy(out.float(), batch[1])

    assert record(Plain(), step=step).low_precision


# ------------------------------------------------------------------ state


class Writes(Plain):
    def __init__(self, what: Callable[[Writes, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.kept: Tensor | None = None
        self.calls, self.value, self.log, self.table = 0, 0.0, [torch.zeros(1)], {"a": torch.zeros(1)}
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        self.what(self, x.detach())
        return super().forward(x)


CONSTANT: dict[str, Callable[[Any, Tensor], Any]] = {
    "count": lambda m, x: m.count.add_(1),
    "buffer": lambda m, x: m.buffer.mul_(0.9).add_(0.1),
    "calls": lambda m, x: setattr(m, "calls", m.calls + 1),
    "kept": lambda m, x: setattr(m, "kept", torch.arange(5)),
    "fresh": lambda m, x: setattr(m, "fresh", torch.ones(2)),
}
DEPENDENT: dict[str, Callable[[Any, Tensor], Any]] = {
    "buffer": lambda m, x: m.buffer.mul_(0.9).add_(x.mean(0)),
    "kept": lambda m, x: setattr(m, "kept", x.sum() + (0 if m.kept is None else m.kept)),
    "value": lambda m, x: setattr(m, "value", 0.9 * m.value + float(x.mean())),
    "log": lambda m, x: m.log.append(x.mean()),
    "table": lambda m, x: m.table.setdefault("first", x.mean()),
    "a.weight": lambda m, x: m.a.weight.data.add_(x.mean()),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_state_written_alike_for_every_sample(name: str) -> None:
    found = record(Writes(CONSTANT[name]))
    assert found.constant_writes == (name,) and found.sample_writes == ()


@pytest.mark.parametrize("name", DEPENDENT)
def test_state_that_depends_on_a_sample(name: str) -> None:
    found = record(Writes(DEPENDENT[name]))
    assert found.sample_writes == (name,) and found.constant_writes == ()


SCRATCH: dict[str, Callable[[Any, Tensor], Any]] = {
    "kept": lambda m, x: setattr(m, "kept", x),
    "value": lambda m, x: setattr(m, "value", float(x.mean())),
    "log": lambda m, x: m.log.__setitem__(0, x.mean()),
    "table": lambda m, x: m.table.update(a=x.mean()),
    "fresh": lambda m, x: setattr(m, "fresh", x.mean()),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_attribute_that_every_step_overwrites(name: str) -> None:
    model = Writes(SCRATCH[name])
    log, table = model.log, model.table
    found = record(model)
    assert found.scratch == (("", name),) and not (found.sample_writes or found.constant_writes)
    assert model.log is log and model.table is table and torch.equal(log[0], torch.zeros(1)) and list(table) == ["a"]


class ReadsFirst(Plain):
    """Overwrites an attribute in every step, after it has used what the step before left."""

    last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x + self.last)
        self.last = x.detach().mean()
        return out


def test_attribute_that_is_read_before_it_is_overwritten() -> None:
    found = record(ReadsFirst())
    assert found.scratch == () and found.sample_writes == ("last",)


def test_number_of_samples_is_no_secret_about_one_of_them_but_a_batch_size_that_is_kept_is_reported() -> None:
    """``add or remove one sample`` changes it: what it is told by must not be released."""
    found = record(Writes(lambda m, x: setattr(m, "kept", torch.tensor(float(len(x))))))
    assert found.scratch == (("", "kept"),)


# ------------------------------------------------------------------ layouts


def test_layout_of_layers() -> None:
    found = record(Plain())
    assert [(c.path, dims(c.inputs), dims(c.output)) for c in found.layers] == [
        ("a.weight&a.bias@linear/3", [SampleDim(0), None, None], [SampleDim(0)]),
        ("a", [SampleDim(0)], [SampleDim(0)]),
        ("b.weight&b.bias@linear/3", [SampleDim(0), None, None], [SampleDim(0)]),
        ("b", [SampleDim(0)], [SampleDim(0)]),
        ("", [SampleDim(0)], [SampleDim(0)]),
    ]


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frame, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.frame(x.flatten(0, 1)).mean((2, 3))
        return self.head(frames.unflatten(0, x.shape[:2]).mean(1))


def test_frames_folded_into_the_batch() -> None:
    found = record(Folded(), items(3, 2, 5, 5))
    assert dims(layer(found, "frame").inputs) == [SampleDim(0, rows=3)]
    assert dims(layer(found, "head").inputs) == [SampleDim(0)]
    assert found.rows_per_sample == 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x.transpose(0, 1))
        return self.head(out)[-1]


def test_time_major_layers() -> None:
    found = record(Recurrent(), items(3, 4))
    assert dims(layer(found, "rnn").inputs) == [SampleDim(1)]
    assert dims(layer(found, "rnn").output) == [SampleDim(1), SampleDim(1)]
    assert dims(layer(found, "head").inputs) == [SampleDim(1)]


class TwoViews(Plain):
    def __init__(self, *, adjacent: bool) -> None:
        super().__init__()
        self.adjacent = adjacent

    def forward(self, x: Tensor) -> Tensor:
        views = (x, x.flip(1))
        both = torch.stack(views, 1).flatten(0, 1) if self.adjacent else torch.cat(views)
        out = super().forward(both)
        return out.unflatten(0, (-1, 2)).mean(1) if self.adjacent else sum(out.chunk(2)) / 2


@pytest.mark.parametrize("adjacent", [True, False])
def test_two_rows_per_sample_adjacent_or_interleaved(adjacent: bool) -> None:
    found = record(TwoViews(adjacent=adjacent))
    assert dims(layer(found, "a").inputs) == [SampleDim(0, rows=2, interleaved=not adjacent)]
    assert dims(layer(found, "b").output) == [SampleDim(0, rows=2, interleaved=not adjacent)]


def test_several_rows_per_sample_in_the_batch() -> None:
    def collate(samples: list[Any]) -> Any:
        return torch.cat([x for x, _ in samples]), torch.tensor([y for _, y in samples for _ in range(2)])

    found = record(Plain(), items(2, 6), collate=collate)
    assert found.rows_per_sample == 2
    assert dims(found.calls[0].inputs) == [SampleDim(0, rows=2)]


class Packed(Plain):
    """All rows of all samples in one row for the layers inside, as attention without padding has them."""

    def __init__(self, *, adjacent: bool) -> None:
        super().__init__()
        self.adjacent = adjacent

    def forward(self, x: Tensor) -> Tensor:
        rows = x if self.adjacent else x.transpose(0, 1)
        out = super().forward(rows.flatten(0, 1).unsqueeze(0))[0]
        return out.unflatten(0, rows.shape[:2]).mean(1 if self.adjacent else 0)


@pytest.mark.parametrize("adjacent", [True, False])
def test_samples_that_shapes_do_not_tell_are_told_by_values(adjacent: bool) -> None:
    """Alone, such a tensor looks like one with a single row for its sample."""
    found = record(Packed(adjacent=adjacent), items(2, 6))
    assert dims(layer(found, "a").inputs) == [SampleDim(1, rows=2, interleaved=not adjacent)]
    assert dims(layer(found, "b").output) == [SampleDim(1, rows=2, interleaved=not adjacent)]


class TokenPerRow(Plain):
    """A learned row beside each row of every sample: made of a parameter, as often as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return super().forward(rows + self.token.expand(len(rows), -1)).unflatten(0, x.shape[:2]).mean(1)


def test_a_parameter_that_is_repeated_for_several_rows_of_every_sample() -> None:
    found = record(TokenPerRow(), items(2, 6))
    assert dims(layer(found, "(token@expand/1)").output) == [SampleDim(0, rows=2)]
    assert dims(layer(found, "a").inputs) == [SampleDim(0, rows=2)]


def test_values_inside_the_model_are_kept_only_where_shapes_do_not_tell_the_samples() -> None:
    model, data = Folded(), torch.stack([x for x, _ in items(3, 2, 5, 5)])
    log = StepLog(layers=True, one_row=len(data))
    with recorder(model, log):
        model(data)

    def meta(path: str) -> list[bool]:
        return [t.is_meta for call in log.calls[path] for t in pytree.tensors((call.args, call.output))]

    assert meta("head") == [True, True], "one row for each sample"
    assert meta("frame") == [False, False], "three rows for each"
    assert meta("") == [False, False], "the model's own inputs and outputs are compared"


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, 6), nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        return self.head((self.words(x) + self.places(places)).mean(1))


def test_positions_carry_no_samples() -> None:
    found = record(Positions(), words())
    assert dims(layer(found, "places").inputs) == [None] and dims(layer(found, "places").output) == [None]
    assert dims(layer(found, "words").output) == [SampleDim(0)]


def test_every_call_of_a_layer_has_its_layout() -> None:
    class Both(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.a(x.unsqueeze(0)).squeeze(0))

    found = record(Both())
    assert [dims(layer(found, "a", n).inputs) for n in (0, 1)] == [[SampleDim(1)], [SampleDim(0)]]


def test_model_that_is_called_in_parts_has_a_layout_problem() -> None:
    found = record(Plain(), step=lambda model, batch: F.cross_entropy(model.b(model.a(batch[0])), batch[1]))
    assert "never calls the model itself" in found.layout_problem


def test_number_of_calls_that_depends_on_the_batch_is_a_problem_of_that_layer() -> None:
    class Loop(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(row) for row in x.split(1)]))

    found = record(Loop())
    assert not found.layout_problem
    assert all("number of calls" in c.problem for c in found.layers if c.path == "a")
    assert [c.problem for c in found.layers if c.path == "b"] == [""]


# ------------------------------------------------------------------ no trace


class Messy(Plain):
    """Writes everything that can be written, and draws from every generator."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("gone", torch.ones(2), persistent=False)
        self.seen: list[Tensor] = []
        self.table: dict[str, Any] = {"n": 0}
        self.last: Tensor | None = None
        self.calls = 0
        self.fails = fails
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        import random

        self.calls += 1
        self.average.add_(x.detach().mean(0))
        self.gone = torch.zeros(3)
        self.seen.append(x.detach())
        self.table["n"] = self.calls
        self.last = x.detach()
        self.new = x.detach()
        self.a.weight.data.mul_(1.01)
        self.drop.eval()
        random.random(), np.random.rand(), torch.rand(3)
        out = self.b(torch.tanh(self.drop(self.a(x))))
        if self.fails and len(x) > 1:
            raise RuntimeError("the step fails half-way")
        return out


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """A deep copy of all that can be looked at."""
    return copy.deepcopy({
        "state": model.state_dict(),
        "attributes": {p: dict(vars(m)) for p, m in model.named_modules()},
        "grads": [p.grad for p in model.parameters()],
        "optimizer": optimizer.state_dict(),
    })


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, nn.Module):
        return isinstance(b, nn.Module) and same(
            {k: v for k, v in vars(a).items() if k != "_modules"}, {k: v for k, v in vars(b).items() if k != "_modules"}
        )
    return a is b or a == b


def trained(*, fails: bool) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """A model in the middle of a training: gradients are there, the optimizer has a state."""
    torch.manual_seed(0)
    model = Messy(fails=False).train()
    optimizer = torch.optim.Adam(model.parameters())
    loader: Any = DataLoader(items(6, samples=12), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    for batch in loader:
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()
    model.drop.train()
    model.fails = fails
    return model, optimizer, loader


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(fails: bool) -> None:
    model, optimizer, loader = trained(fails=fails)
    before = everything(model, optimizer)
    identities = {n: (id(p), id(p.grad), p.data_ptr()) for n, p in model.named_parameters()}
    buffers = {n: id(b) for n, b in model.named_buffers()}
    samples = probe.take(loader)
    with generators_unchanged():
        subject = Subject(model, TrainingStep(classify, "test", loss_known=True))
        if fails:
            with pytest.raises(dpfix.TrainingStepError, match="half-way"):
                observe(subject, samples)
        else:
            observe(subject, samples)
    after = everything(model, optimizer)
    for key, value in before.items():
        assert same(value, after[key]), key
    assert {n: (id(p), id(p.grad), p.data_ptr()) for n, p in model.named_parameters()} == identities
    assert {n: id(b) for n, b in model.named_buffers() if n != "gone"} == {
        n: i for n, i in buffers.items() if n != "gone"
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_the_whole_call_leaves_no_trace_when_it_refuses(fails: bool) -> None:
    model, optimizer, loader = trained(fails=fails)
    before = everything(model, optimizer)
    with generators_unchanged(), pytest.raises(dpfix.DPFixError):
        dpfix.make_private_safe(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            training_step=classify,
        )
    after = everything(model, optimizer)
    for key, value in before.items():
        assert same(value, after[key]), key


def test_the_order_of_the_loader_is_left_alone() -> None:
    data = items(6, samples=12)

    def orders(*, look: bool) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        loader: Any = DataLoader(data, batch_size=4, shuffle=True, generator=generator)  # type: ignore[arg-type]
        torch.manual_seed(4)
        if look:
            samples = probe.take(loader)
            observe(Subject(Plain(), TrainingStep(classify, "test", loss_known=True)), samples)
        return [y.tolist() for _ in range(2) for _, y in loader]

    torch.manual_seed(0)
    assert orders(look=True) == orders(look=False)


def test_a_random_dataset_is_read_without_moving_the_generators() -> None:
    class Augmented(list):  # type: ignore[type-arg]
        def __getitem__(self, i: Any) -> Any:
            import random

            x, y = super().__getitem__(i)
            return x + torch.randn(6) * random.random() * np.random.rand(), y

    loader: Any = DataLoader(Augmented(items(6, samples=8)), batch_size=4)  # type: ignore[arg-type]
    model = Plain()
    with generators_unchanged():
        dpfix.diagnose(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            criterion=nn.CrossEntropyLoss(),
        )
