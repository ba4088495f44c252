"""The entry points as a script sees them."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.grad_sample import AbstractGradSampleModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.engines import ENGINES
from tests.cases import Unused, mlp
from tests.helpers import points, setting, sgd, train

every_engine = pytest.mark.parametrize("engine", ENGINES)


def epsilon_setting(**changes: Any) -> dict[str, Any]:
    given = {"privacy_engine": PrivacyEngine(accountant="rdp")} | setting(**changes)  # the quickest to search
    del given["noise_multiplier"]
    return given | {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2}


# ------------------------------------------------------------------ what comes back


def test_unpacks_like_opacus_and_carries_the_rest() -> None:
    given = setting()
    training = dpfix.make_private_safe(**given)
    model, optimizer, loader = training
    assert isinstance(training, dpfix.PrivateTraining) and len(training) == 3
    assert model._module is given["module"]
    assert optimizer.original_optimizer is given["optimizer"]
    assert loader.dataset is given["data_loader"].dataset
    assert isinstance(training.report, dpfix.Report) and isinstance(training.plan, dpfix.Plan)
    assert isinstance(training.privacy_engine, PrivacyEngine)
    assert training.plan.engine in ENGINES and training.report.engine == training.plan.engine


def test_epsilon_grows_with_the_steps() -> None:
    training = dpfix.make_private_safe(**setting())
    assert training.get_epsilon(1e-3) == 0
    train(training, 2)
    first = training.get_epsilon(1e-3)
    train(training, 2)
    assert 0 < first < training.get_epsilon(1e-3) < math.inf
    assert training.get_epsilon(1e-2) < training.get_epsilon(1e-3)


def test_no_noise_is_no_privacy() -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=0.0))
    train(training, 1)
    assert training.get_epsilon(1e-3) == math.inf
    assert any("no privacy" in caution for caution in training.statement(1e-3).cautions)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2.0, "1e-5"])
def test_delta_is_checked(delta: Any) -> None:
    training = dpfix.make_private_safe(**setting())
    with pytest.raises(dpfix.ArgumentError, match="delta"):
        training.get_epsilon(delta)


def test_statement_says_what_is_claimed() -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=1.5, max_grad_norm=0.7))
    train(training, 4)
    statement = training.statement(1e-3)
    assert (statement.steps, statement.samples) == (4, 24)
    assert (statement.noise_multiplier, statement.max_grad_norm) == (1.5, 0.7)
    assert statement.sampling_rate == 8 / 24 and statement.sampling_used == "Poisson"
    assert statement.epsilon == training.get_epsilon(1e-3) and statement.delta == 1e-3
    assert not statement.secure_rng
    text = str(statement)
    assert all(word in text for word in ("unit", "adjacency", "sampling assumed", "accountant", "not covered", "prv"))
    assert json.loads(statement.to_json())["steps"] == 4


def test_statement_warns_of_shuffling_and_of_a_large_delta() -> None:
    training = dpfix.make_private_safe(**setting(poisson_sampling=False))
    cautions = " ".join(training.statement(0.1).cautions)
    assert "Poisson" in cautions and "delta" in cautions


def test_report_in_three_forms() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True), nn.Linear(16, 3))
    report = dpfix.make_private_safe(**setting(model)).report
    assert {f.code for f in report.repairs} == {"DPF001", "DPF003"}
    text = report.details()
    assert all(
        word in text for word in ("BatchNorm1d at `1`", "GroupNorm(2, 16)", "changes-model", "exact:", "engine:")
    )
    assert json.loads(report.to_json())["engine"] == report.engine
    assert report.to_html().startswith("<!doctype html>") and "DPF001" in report.to_html()
    assert {e.engine for e in report.evidence} == set(ENGINES)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_grad_norms", "max_grad_norm"), ("grad_sample_modes", "grad_sample_mode"), ("poisson", "poisson_sampling"),
     ("noise_generators", "noise_generator"), ("epoch", None)],
)  # fmt: skip
def test_unknown_keyword_names_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(TypeError, match=f"`{name}`") as caught:
        dpfix.make_private_safe(**setting(), **{name: 1})
    assert isinstance(caught.value, dpfix.UnknownArgumentError)
    assert near is None or f"Did you mean `{near}`?" in str(caught.value)


def test_unknown_keyword_of_the_epsilon_call() -> None:
    with pytest.raises(dpfix.UnknownArgumentError, match="`epsilon_tolerances`"):
        dpfix.make_private_safe_with_epsilon(**epsilon_setting(), epsilon_tolerances=0.1)


@pytest.mark.parametrize(
    "changes",
    [{"target_epsilon": 0}, {"target_epsilon": -1.0}, {"epochs": 0}, {"target_delta": 0}, {"target_delta": 1.5}],
)
def test_bad_budgets(changes: dict[str, Any]) -> None:
    with pytest.raises(dpfix.ArgumentError, match=next(iter(changes)).removeprefix("target_")):
        dpfix.make_private_safe_with_epsilon(**epsilon_setting() | changes)


def test_budget_that_cannot_be_reached() -> None:
    given = epsilon_setting() | {"target_epsilon": 1e-6, "target_delta": 1e-12, "epochs": 1000}
    with pytest.raises(dpfix.ArgumentError, match="cannot be reached"):
        dpfix.make_private_safe_with_epsilon(**given)


@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_target_epsilon_is_reached_and_kept(accountant: str) -> None:
    given = epsilon_setting(privacy_engine=PrivacyEngine(accountant=accountant))
    training = dpfix.make_private_safe_with_epsilon(**given)
    train(training, 2 * len(training[2]))
    assert 0.8 * 5.0 < training.get_epsilon(1e-3) <= 5.0


# ------------------------------------------------------------------ engines of Opacus


@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_own_privacy_engine_counts(accountant: str) -> None:
    engine = PrivacyEngine(accountant=accountant)
    training = dpfix.make_private_safe(**setting(privacy_engine=engine))
    assert training.privacy_engine is engine
    train(training, 3)
    assert sum(entry[-1] for entry in engine.accountant.history) == 3
    assert training.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    assert training.statement(1e-3).accountant == accountant


def test_safe_privacy_engine_changes_one_import() -> None:
    engine = dpfix.SafePrivacyEngine(accountant="rdp")
    model, optimizer, loader = training = engine.make_private(**setting())
    assert isinstance(training, dpfix.PrivateTraining) and training.privacy_engine is engine
    train((model, optimizer, loader), 2)
    assert engine.get_epsilon(1e-3) > 0


def test_safe_privacy_engine_with_epsilon() -> None:
    engine = dpfix.SafePrivacyEngine(accountant="rdp")
    given = epsilon_setting()
    del given["privacy_engine"]
    training = engine.make_private_with_epsilon(**given)
    train(training, 2 * len(training[2]))
    assert engine.get_epsilon(1e-3) <= 5.0


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    first = dpfix.make_private_safe(**setting())
    train(first, 3)
    first.privacy_engine.save_checkpoint(path=tmp_path / "c.pt", module=first[0], optimizer=first[1])
    second = dpfix.make_private_safe(**setting())
    second.privacy_engine.load_checkpoint(path=tmp_path / "c.pt", module=second[0], optimizer=second[1])
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.privacy_engine.accountant.history == first.privacy_engine.accountant.history
    train(second, 1)


# ------------------------------------------------------------------ diagnose


def test_diagnose_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True), nn.Linear(16, 3))
    given = setting(model)
    before, children = copy.deepcopy(model.state_dict()), list(model)
    state = torch.get_rng_state()
    arguments = {k: v for k, v in given.items() if k not in ("noise_multiplier", "max_grad_norm")}
    report = dpfix.diagnose(**arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(children, model, strict=True)) and model[2].inplace
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {f.code for f in report.repairs} == {"DPF001", "DPF003"} and report.engine
    assert not model._forward_hooks and "forward" not in vars(model)


def test_diagnose_reports_refusals() -> None:
    given = setting(nn.Sequential(mlp(), nn.Dropout()).eval())
    report = dpfix.diagnose(**{k: given[k] for k in ("module", "optimizer", "data_loader")})
    assert [f.code for f in report.refusals] == ["DPF004"] and not report.engine
    assert "Dropout at `1`" in report.refusals[0].why


def test_a_model_whose_layers_do_not_look_at_the_mode_is_put_into_training_mode() -> None:
    model = mlp().eval()
    private = dpfix.make_private_safe(**setting(model))
    assert model.training and [f.code for f in private.report.repairs] == ["DPF004"]
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    x, y = next(iter(private[2]))
    F.cross_entropy(private[0](x), y).backward()
    private[1].step()
    assert not torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


class Centred(nn.Module):
    """Takes the mean of the batch away."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_diagnose_tells_a_refusal_in_its_parts() -> None:
    given = setting(nn.Sequential(nn.Linear(6, 3), Centred()))
    report = dpfix.diagnose(**{k: given[k] for k in ("module", "optimizer", "data_loader", "criterion")})
    (finding,) = report.refusals
    assert (finding.code, finding.path) == ("DPF013", "1")
    assert finding.fact.startswith("Centred at `1`") and finding.why.startswith("sample i's output")
    assert str(report).count("DPF013") == 1 and json.loads(report.to_json())["findings"][0]["path"] == "1"
    with pytest.raises(dpfix.CoupledModelError) as raised:
        dpfix.make_private_safe(**given)
    assert raised.value.findings == (finding,) and str(raised.value) == str(finding)


def test_every_engine_that_failed_is_told_on_a_line_of_its_own() -> None:
    weight = nn.Parameter(torch.ones(6))
    model = mlp()
    model.register_parameter("penalised", weight)
    given = setting(model, criterion=None, training_step=lambda m, b: F.cross_entropy(m(b[0]), b[1]) + weight.sum())
    with pytest.raises(dpfix.NoEngineError) as raised:
        dpfix.make_private_safe(**given)
    (finding,) = raised.value.findings
    lines = str(raised.value).splitlines()
    assert lines[0] == f"DPF016 [breaks-guarantee] {finding.fact}" and lines[1] == "  why:"
    assert [line.split(":")[0] for line in lines[2:-1]] == [f"        {name}" for name in ENGINES]
    assert lines[-1] == f"  help: {finding.help}"


def test_a_diagnosis_has_the_defaults_of_the_call() -> None:
    call, diagnosis = (inspect.signature(f).parameters for f in (dpfix.make_private_safe, dpfix.diagnose))
    assert diagnosis.keys() < call.keys()
    assert {n: p.default for n, p in diagnosis.items()} == {n: call[n].default for n in diagnosis}


# ------------------------------------------------------------------ the model afterwards

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def leftovers(model: nn.Module, pristine: nn.Module) -> list[str]:
    """What a private training left on a model, compared with one that never was in training."""
    found = [f"{n}: {h}" for n, m in model.named_modules() for h in HOOKS if getattr(m, h)]
    for (name, m), other in zip(model.named_modules(), pristine.modules(), strict=True):
        found += [f"{name}.{key}" for key in vars(m).keys() - vars(other).keys()]
    for name, p in model.named_parameters():
        found += [f"{name}.{key}" for key in vars(p)]
        found += [f"{name} hooks" for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks]
    return found


@every_engine
@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "bare"])
def test_to_standard_module_leaves_nothing(engine: str, wrap: bool) -> None:
    model = Unused()
    training = dpfix.make_private_safe(**setting(model, grad_sample_mode=engine, wrap_model=wrap))
    stepping = training[0] if wrap else model
    train((stepping, training[1], training[2]), 2)
    if wrap:
        assert training[0].to_standard_module() is model
    else:
        training[0].cleanup()
    assert not leftovers(model, Unused())
    assert all(p.requires_grad for p in model.parameters())
    optimizer = sgd(model, 0.1)
    model(points().tensors[0]).sum().backward()
    optimizer.step()


@every_engine
def test_deepcopy_of_the_private_model(engine: str) -> None:
    training = dpfix.make_private_safe(**setting(grad_sample_mode=engine))
    train(training, 1)
    copied = copy.deepcopy(training[0])
    x = points().tensors[0]
    with torch.no_grad():
        assert torch.equal(copied(x), training[0](x))
        next(copied.parameters()).zero_()
        assert not torch.equal(copied(x), training[0](x))
    train(training, 2)


@every_engine
def test_second_call_on_the_same_model(engine: str) -> None:
    model = mlp()
    given = setting(model, grad_sample_mode=engine)
    first = dpfix.make_private_safe(**given)
    steps = train(first, 2)
    for module in (first[0], model):
        again = dpfix.make_private_safe(**given | {"module": module, "optimizer": first[1]})
        assert again[0]._module is model
        assert train(again, 2) == 2
        steps += 2
        assert again.privacy_engine.accountant.history[-1][-1] == steps  # those that the model has released in all


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "bare"])
def test_state_dicts_load_in_both_directions(wrap: bool) -> None:
    model, other = mlp(), mlp()
    training = dpfix.make_private_safe(**setting(model, wrap_model=wrap))
    target = training[0] if wrap else model
    target.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight)
    if wrap:
        training[0].load_state_dict(training[0].state_dict())
    train((target, training[1], training[2]), 1)
    other.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@every_engine
def test_evaluation_is_ordinary(engine: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x = points().tensors[0]
    wanted = copy.deepcopy(model).eval()(x)
    training = dpfix.make_private_safe(**setting(model, grad_sample_mode=engine))
    training[0].eval()
    torch.testing.assert_close(training[0](x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(training[0](x[:0]), wanted[:0])


def test_wrapper_answers_for_the_model() -> None:
    model = mlp()
    model.classes = ("a", "b", "c")
    training = dpfix.make_private_safe(**setting(model))
    assert training[0].classes == model.classes
    assert isinstance(training[0], nn.Module) and not hasattr(training[0], "nothing_of_this_name")


def test_noise_generator_decides_the_noise() -> None:
    moved = []
    for _ in range(2):
        torch.manual_seed(0)
        model = mlp()
        generator = torch.Generator().manual_seed(11)
        training = dpfix.make_private_safe(**setting(model, noise_generator=generator, poisson_sampling=False))
        torch.manual_seed(len(moved))
        train(training, 1)
        moved.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_other_clipping(clipping: str) -> None:
    options = {"max_grad_norm": [1.0] * 4} if clipping == "per_layer" else {
        "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
        "min_clipbound": 0.01, "unclipped_num_std": 1.0,
    }  # fmt: skip
    training = dpfix.make_private_safe(**setting(clipping=clipping, **options))
    assert train(training, 3) == 3


def test_single_sample_datasets_are_enough() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=DataLoader(points(2), batch_size=1)))
    assert train(training, 3) == 3


def test_a_collate_that_rejects_changed_samples_is_no_obstacle() -> None:
    """The harder probes change labels; a collate function may refuse every one of them."""

    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        if any(int(y) != 1 or float(x.abs().max()) in (0.0, 7.0) for x, y in items):
            raise ValueError("no such sample")
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    data = [(torch.randn(6), torch.tensor(1)) for _ in range(12)]
    model = nn.Sequential(nn.Linear(6, 3))
    private = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=4, collate_fn=collate),  # type: ignore[arg-type]
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert any("harder" in line for line in private.report.audit)


def test_a_step_hook_of_the_script_does_not_take_the_accountants_place() -> None:
    """Opacus's optimizers keep one hook; without the accountant's, epsilon would stay 0."""
    training = dpfix.make_private_safe(**setting())
    seen: list[float] = []
    training[1].attach_step_hook(lambda optimizer: seen.append(-1.0))
    training[1].attach_step_hook(lambda optimizer: seen.append(optimizer.noise_multiplier))
    train(training, 3)
    assert seen == [1.0] * 3
    assert training.privacy_engine.accountant.history == [(1.0, 8 / 24, 3)]


def test_a_step_hook_that_calls_the_earlier_one_does_not_count_twice() -> None:
    """The usual way round Opacus's single hook."""
    training = dpfix.make_private_safe(**setting())
    earlier, seen = training[1].step_hook, []
    training[1].attach_step_hook(lambda optimizer: seen.append(earlier(optimizer)))
    train(training, 3)
    assert len(seen) == 3 and training.privacy_engine.accountant.history == [(1.0, 8 / 24, 3)]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "microbatch", "hooks", "functorch", "ew"])
def test_a_copy_of_the_wrapper_is_not_in_training(mode: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    training = dpfix.make_private_safe(**setting(grad_sample_mode=mode))
    train(training, 1)
    model, x = training[0], torch.randn(4, 6)
    copied = duplicate(model)
    assert isinstance(copied, AbstractGradSampleModule) and list(copied.state_dict()) == list(model.state_dict())
    copied(x).sum().backward()  # an ordinary one
    assert all(p.grad is not None and p.grad_sample is None for p in copied.parameters())
    plain = copied.to_standard_module()
    training[1].zero_grad()  # expanded weights want that before every call
    assert torch.allclose(plain(x), model.eval()(x)) and not vars(plain).keys() & {"forward"}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    model.train()
    train(training, 1)  # goes on
    training[1].zero_grad()
    assert not torch.allclose(plain(x), model.eval()(x))


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "microbatch"])
def test_a_model_that_is_not_wrapped_can_be_pickled_while_training(mode: str) -> None:
    given = setting(grad_sample_mode=mode, wrap_model=False)
    training = dpfix.make_private_safe(**given)
    x = torch.randn(4, 6)
    loaded = pickle.loads(pickle.dumps(given["module"]))
    loaded(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert torch.allclose(loaded(x), given["module"](x))
    train((given["module"], *training[1:]), 2)  # goes on
