"""Whatever is refused leaves everything as it was, and says what, where and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import dpfix
from tests.helpers import Setting, assert_same_generators, generator_states, points, setting, sgd

# ------------------------------------------------------------------ what must not change


def host(part: nn.Module | None = None) -> nn.Module:
    """A model that dpfix would repair in two places, with some part inside."""
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Identity() if part is None else part, nn.Linear(16, 3))


def module_picture(model: nn.Module) -> dict[str, Any]:
    """Identity, class, flags, attributes and tensors of every submodule."""
    return {path: (id(m), type(m), _attributes(m)) for path, m in model.named_modules(remove_duplicate=False)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _copy(value) for name, value in vars(module).items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (id(value), value.requires_grad, _copy(value.grad) if value.is_leaf else None, value.detach().clone())
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(v) for v in value]
    return value


def difference(a: Any, b: Any, path: str = "") -> str:
    """Where two pictures first differ; empty if they are bit-identical."""
    if isinstance(a, Tensor):
        return "" if isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) else f"{path}: values"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{path}: {list(a)} became {list(b)}"
        return next(filter(None, (difference(a[k], b[k], f"{path}.{k}") for k in a)), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {a} became {b}"
        return next(
            filter(None, (difference(x, y, f"{path}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    return "" if a == b else f"{path}: {a} became {b}"


def optimizer_picture(optimizer: torch.optim.Optimizer) -> Any:
    """Groups, state and step hooks."""
    state = {id(p): _copy(values) for p, values in optimizer.state.items()}
    hooks = [list(optimizer._optimizer_step_pre_hooks), list(optimizer._optimizer_step_post_hooks)]
    return [_copy(group) for group in optimizer.param_groups], state, hooks, type(optimizer)


def loader_picture(loader: DataLoader[Any]) -> Any:
    """Everything a loader holds, by identity."""
    return {k: id(v) for k, v in vars(loader).items()}, type(loader)


def picture(given: Setting) -> list[Any]:
    """All three objects of a call, as far as they are what they should be."""
    parts: list[tuple[str, type, Callable[[Any], Any]]] = [
        ("module", nn.Module, module_picture),
        ("optimizer", torch.optim.Optimizer, optimizer_picture),
        ("data_loader", DataLoader, loader_picture),
    ]
    return [take(given[name]) for name, kind, take in parts if isinstance(given[name], kind)]


# ------------------------------------------------------------------ what is refused


class Stream(IterableDataset[Any]):
    """A stream."""

    def __iter__(self) -> Any:
        return iter([(torch.zeros(6), 0)] * 8)

    def __len__(self) -> int:
        return 8


class Broken(Dataset[Any]):
    """A dataset whose samples cannot be read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        raise KeyError(f"file {index} is missing")


class BatchMean(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class RunningMean(nn.Module):
    """Keeps a running mean in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


class Cache(nn.Module):
    """Keeps its first input as a plain attribute."""

    first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach()
        return x


class WordMean(nn.Module):
    """An embedding inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 16, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.words(torch.arange(5)).mean(0)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    weights = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * weights


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def failing(model: nn.Module, batch: Any) -> Tensor:
    torch.rand(3)
    return model(batch[0][:, :2]).sum()


def with_optimizer(build: Callable[[nn.Module], torch.optim.Optimizer]) -> Setting:
    model = host()
    return setting(model, optimizer=build(model))


def twice(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    optimizer.param_groups.append(optimizer.param_groups[0] | {"params": [model[0].weight]})
    return optimizer


def loading(**options: Any) -> Setting:
    return setting(host(), data_loader=DataLoader(options.pop("dataset", None) or points(), **options))


def spectral(**changes: Any) -> Setting:
    model = host()
    model.register_parameter("filter", nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))
    return setting(model, **changes)


@dataclass(frozen=True)
class Refusal:
    """A call that is refused, and how."""

    name: str
    error: type[dpfix.DPFixError]
    says: str
    given: Callable[[], Setting]


def changed(**changes: Any) -> Callable[[], Setting]:
    return lambda: setting(host(), **changes)


REFUSALS = (
    Refusal("module", dpfix.ArgumentError, "module is str", lambda: setting(host()) | {"module": "resnet"}),
    Refusal("optimizer", dpfix.ArgumentError, "optimizer is list", lambda: setting(host()) | {"optimizer": []}),
    Refusal("loader", dpfix.ArgumentError, "data_loader is list", lambda: setting(host()) | {"data_loader": []}),
    Refusal("negative-noise", dpfix.ArgumentError, "noise_multiplier=-1", changed(noise_multiplier=-1)),
    Refusal("nan-noise", dpfix.ArgumentError, "noise_multiplier=nan", changed(noise_multiplier=float("nan"))),
    Refusal("text-noise", dpfix.ArgumentError, "noise_multiplier='1'", changed(noise_multiplier="1")),
    Refusal("no-clip-norm", dpfix.ArgumentError, "max_grad_norm=0", changed(max_grad_norm=0)),
    Refusal("infinite-clip-norm", dpfix.ArgumentError, "max_grad_norm=inf", changed(max_grad_norm=float("inf"))),
    Refusal("list-clip-norm", dpfix.ArgumentError, "clipping='flat'", changed(max_grad_norm=[1.0, 1.0])),
    Refusal("short-clip-norms", dpfix.ArgumentError, "one number per trainable parameter",
            changed(max_grad_norm=[1.0], clipping="per_layer")),
    Refusal("mode", dpfix.ArgumentError, "Did you mean 'hooks'", changed(grad_sample_mode="hook")),
    Refusal("reduction", dpfix.ArgumentError, "Did you mean 'mean'", changed(loss_reduction="means")),
    Refusal("norm", dpfix.ArgumentError, "norm='batch'", changed(norm="batch")),
    Refusal("clipping", dpfix.ArgumentError, "clipping='none'", changed(clipping="none")),
    Refusal("unknown", dpfix.UnknownArgumentError, "`max_grad_norm`", changed(max_grad_norms=2.0)),
    Refusal("ghost-mode", dpfix.ArgumentError, "clips from norms as ghost clipping", changed(grad_sample_mode="ghost")),
    Refusal("evaluation-mode", dpfix.ModelError, "DPF004", lambda: setting(host().eval())),
    Refusal("half", dpfix.ModelError, "DPF009.*float16", lambda: setting(host(nn.Linear(16, 16).half()))),
    Refusal("complex", dpfix.ModelError, "DPF009.*`filter`", spectral),
    Refusal("max-norm", dpfix.ModelError, "`4.words`", lambda: setting(host(WordMean(max_norm=1.0)))),
    Refusal("sparse", dpfix.ModelError, "sparse=True", lambda: setting(host(WordMean(sparse=True)))),
    Refusal("attention-hooks", dpfix.ModelError, "DPF007.*`4`",
            lambda: setting(host(nn.MultiheadAttention(16, 2, batch_first=True)), grad_sample_mode="hooks")),
    Refusal("batch-mean", dpfix.CoupledModelError, "DPF013.*BatchMean at `4`", lambda: setting(host(BatchMean()))),
    Refusal("running-mean", dpfix.StateWrittenError, "DPF012.*`4.mean`", lambda: setting(host(RunningMean()))),
    Refusal("cache", dpfix.StateWrittenError, "DPF012.*`4.first`", lambda: setting(host(Cache()))),
    Refusal("penalty", dpfix.DPFixError, "weight_decay", changed(training_step=penalised)),
    Refusal("contrastive", dpfix.CoupledLossError, "DPF014", changed(training_step=contrastive)),
    Refusal("sum-for-mean", dpfix.LossError, "DPF015.*loss_reduction='sum'", changed(training_step=summed)),
    Refusal("lbfgs", dpfix.OptimizerError, "LBFGS", lambda: with_optimizer(lambda m: torch.optim.LBFGS(m.parameters()))),
    Refusal("sparse-adam", dpfix.OptimizerError, "SparseAdam",
            lambda: with_optimizer(lambda m: torch.optim.SparseAdam(list(m.parameters())))),
    Refusal("missing", dpfix.OptimizerError, "`1.weight`", lambda: with_optimizer(lambda m: sgd(m[0]))),
    Refusal("foreign", dpfix.OptimizerError, r"not in module Sequential.*\(7,\)", lambda: with_optimizer(
        lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(7))], lr=0.1))),
    Refusal("two-groups", dpfix.OptimizerError, "`0.weight` more than once", lambda: with_optimizer(twice)),
    Refusal("stream", dpfix.LoaderError, "Stream, an IterableDataset", lambda: loading(dataset=Stream(), batch_size=4)),
    Refusal("ready-made", dpfix.LoaderError, "batch_size=None", lambda: loading(batch_size=None)),
    Refusal("weighted", dpfix.LoaderError, "WeightedRandomSampler",
            lambda: loading(batch_size=4, sampler=WeightedRandomSampler([1.0] * 24, 24))),
    Refusal("batch-sampler", dpfix.LoaderError, "batch_sampler of its own", lambda: loading(batch_sampler=[[0], [1, 2]])),
    Refusal("unknown-sampler", dpfix.LoaderError, "sampler of its own", lambda: loading(batch_size=4, sampler=[0, 1, 2])),
    Refusal("unreadable", dpfix.LoaderError, "Broken.*file", lambda: loading(dataset=Broken(), batch_size=4)),
    Refusal("vector-loss", dpfix.TrainingStepError, r"shape \(\d, 3\)", changed(training_step=lambda m, b: m(b[0]))),
    Refusal("number-loss", dpfix.TrainingStepError, "float", changed(training_step=lambda m, b: 1.0)),
    Refusal("detached-loss", dpfix.TrainingStepError, "no trainable parameter",
            changed(training_step=lambda m, b: m(b[0]).detach().sum())),
    Refusal("failing-step", dpfix.TrainingStepError, "RuntimeError", changed(training_step=failing)),
    Refusal("all-frozen", dpfix.DPFixError, "parameter", lambda: setting(
        host().requires_grad_(False), optimizer=sgd(nn.Linear(1, 1)))),
)  # fmt: skip

every_refusal = pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)


@every_refusal
@pytest.mark.parametrize("entry", ["plain", "epsilon"])
def test_refusal_leaves_everything_as_it_was(refusal: Refusal, entry: str) -> None:
    given = refusal.given()
    call: Callable[..., Any] = dpfix.make_private_safe
    if entry == "epsilon":
        if "noise" in refusal.name:
            return
        call = dpfix.make_private_safe_with_epsilon
        del given["noise_multiplier"]
        quick = PrivacyEngine(accountant="rdp")
        given |= {"target_epsilon": 8.0, "target_delta": 1e-3, "epochs": 2, "privacy_engine": quick}
    _earlier_step(given)
    before, generators = picture(given), generator_states()
    with pytest.raises(refusal.error, match=f"(?s){refusal.says}") as caught:
        call(**given)
    assert_same_generators(generators)
    assert not difference(before, picture(given))
    assert isinstance(caught.value, dpfix.DPFixError)
    assert len(str(caught.value)) >= 40


def _earlier_step(given: Setting) -> None:
    """The optimizer has state and the parameters have gradients from before the call, where that is possible."""
    optimizer = given["optimizer"]
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        group["momentum"] = 0.5
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_every_class_of_refusal_before_training_is_covered() -> None:
    before_training = {
        e for e in vars(dpfix).values()
        if isinstance(e, type) and issubclass(e, dpfix.DPFixError)
        # the latter four: tests/weights, tests/segmentation, tests/test_distributed.py, tests/training/test_budget.py
        and not issubclass(
            e, (dpfix.MisuseError, dpfix.CheckpointError, dpfix.SegmentationError, dpfix.RankError, dpfix.BudgetError)
        )
    }  # fmt: skip
    raised = {type(_caught(r)) for r in REFUSALS}
    assert before_training - raised <= {dpfix.DPFixError, dpfix.ModelError, dpfix.LossError, dpfix.NoEngineError}


def _caught(refusal: Refusal) -> dpfix.DPFixError:
    with pytest.raises(dpfix.DPFixError) as caught:
        dpfix.make_private_safe(**refusal.given())
    return caught.value


@pytest.mark.parametrize("poisson", [True, False])
def test_successful_call_leaves_the_generators_alone(poisson: bool) -> None:
    given = setting(host(), poisson_sampling=poisson)
    generators = generator_states()
    dpfix.make_private_safe(**given)
    assert_same_generators(generators)


def test_successful_call_leaves_the_loaders_generator_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(points(), batch_size=8, shuffle=True, generator=generator)
    before = generator.get_state()
    dpfix.make_private_safe(**setting(host(), data_loader=loader))
    assert torch.equal(generator.get_state(), before)


def test_successful_call_moves_no_parameter_and_no_statistic() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Linear(16, 3))
    before = copy.deepcopy(model.state_dict())
    dpfix.make_private_safe(**setting(model))
    assert not difference(dict(before), dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_reads_few_samples() -> None:
    read: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    dpfix.make_private_safe(**setting(data_loader=DataLoader(Counted(*points(500).tensors), batch_size=8)))
    assert len(set(read)) <= 16


def test_a_refused_lazy_model_is_lazy_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(affine=False), nn.Flatten(), nn.LazyLinear(3))
    data = TensorDataset(torch.randn(12, 3, 6, 6), torch.randint(0, 3, (12,)))
    classes, parameters = [type(m) for m in model], list(model.parameters())
    rng = torch.get_rng_state()
    with pytest.raises(dpfix.CoupledLossError):
        dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            criterion=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])),
        )
    assert [type(m) for m in model] == classes
    assert all(a is b and type(a) is type(b) for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model[3].weight, nn.parameter.UninitializedParameter)
    assert torch.equal(torch.get_rng_state(), rng)
    model(torch.randn(2, 3, 6, 6))  # and it still creates its parameters by itself
    assert model[3].weight.shape == (3, 128)
