"""Trainings by Lightning's Trainer and Fabric, made private by a callback, in ``configure_optimizers``, or by the plain call."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import points
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

lightning = pytest.importorskip("lightning")
torchmetrics = pytest.importorskip("torchmetrics")

from dpfix.integrations.lightning import PrivateCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
]

DELTA = 1e-3
CLIP = 0.05


class Classifier(lightning.LightningModule):
    """A common LightningModule: calls a part of itself, logs, and updates a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x)
        loss = F.cross_entropy(output, y)
        self.accuracy(output.argmax(1), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("validation", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class CallsItself(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "size": len(batch[1])}


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Adversaries(lightning.LightningModule):
    """Two optimizers; only the discriminator sees data."""

    def __init__(self, real: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.real = False, real
        self.generator = nn.Linear(6, 6)
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def fakes(self, x: Tensor) -> Tensor:
        return self.generator(x if self.real else torch.randn_like(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        for_generator, for_discriminator = self.optimizers()
        for_discriminator.zero_grad()
        self.manual_backward(
            (F.softplus(-self.discriminator(x)) + F.softplus(self.discriminator(self.fakes(x).detach()))).mean()
        )
        for_discriminator.step()
        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(self.fakes(x))).mean())
        for_generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]


def trainer(folder: Path, epochs: int = 2, **changes: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, **(quiet | changes)
    )


def loader(samples: int = 24, batch_size: int = 6) -> Any:
    return DataLoader(points(samples), batch_size=batch_size, shuffle=True)


def fit(folder: Path, module: Any, epochs: int = 2, path: str | None = None, **changes: Any) -> Any:
    """A training with the callback; ``changes`` are arguments of the Trainer, ``private`` those of the callback."""
    private = {"noise_multiplier": 1.0, "max_grad_norm": CLIP} | changes.pop("private", {})
    callback = PrivateCallback(**private)
    made = trainer(folder, epochs, callbacks=[callback], **changes)
    made.fit(module, loader(), DataLoader(points(8), 4), ckpt_path=path)
    return callback, made


@pytest.mark.parametrize("kind", [Classifier, CallsItself, ByHand])
def test_the_callback_releases_the_clipped_sum(kind: type, tmp_path: Path) -> None:
    module = kind()
    callback = PrivateCallback(noise_multiplier=0.0, max_grad_norm=CLIP)
    everybody = DataLoader(points(), batch_size=24)
    before: dict[str, Tensor] = {}

    class Remember(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    trainer(tmp_path, max_steps=1, callbacks=[callback, Remember()]).fit(module, everybody)
    moved = {n: (before[n] - p.detach()) * 24 for n, p in module.named_parameters()}
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.copy_(before[n])
    singles = [(x[None], y[None]) for x, y in points()]
    wanted = clipped_sum(gradients_one_by_one(module, lambda m, b: F.cross_entropy(m(b[0]), b[1]), singles), CLIP)
    assert relative_error(moved, wanted) < 1e-3


def test_values_that_are_logged_and_metrics_are_those_of_the_real_steps(tmp_path: Path) -> None:
    _, by_callback = fit(tmp_path, Classifier(), private={"seed": 1})
    torch.manual_seed(0)
    _, one_by_one = fit(tmp_path, Classifier(), private={"seed": 1, "grad_sample_mode": "microbatch"})
    torch.manual_seed(0)
    module = Classifier()
    seen: list[float] = []
    real = module.log
    module.log = lambda name, value, **k: (
        seen.append(float(value)) if name == "loss" else None,
        real(name, value, **k),
    )  # type: ignore[method-assign]
    fit(tmp_path, module, private={"seed": 1})
    assert len(seen) == 8  # once per step, whatever was looked at before
    first, second = by_callback.callback_metrics, one_by_one.callback_metrics
    assert {"loss", "accuracy", "validation", "epsilon"} <= first.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in ("loss", "accuracy"))


def test_epsilon_is_a_metric_and_the_checkpoint_is_plain(tmp_path: Path) -> None:
    module = Classifier()
    keys = [k for k in module.state_dict() if "running" not in k and "tracked" not in k]
    callback, made = fit(tmp_path, module, private={"delta": DELTA})
    assert made.callback_metrics["epsilon"] == pytest.approx(callback.private.get_epsilon(DELTA), rel=1e-5)
    assert callback.statement().steps == made.global_step == 8
    made.save_checkpoint(tmp_path / "a.ckpt")
    assert list(torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]) == keys
    assert not {"training_step", "log", "load_state_dict"} & vars(module).keys()


def test_a_training_that_goes_on_states_the_epsilon_of_both_runs(tmp_path: Path) -> None:
    _, first = fit(tmp_path, Classifier(), epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    whole, _ = fit(tmp_path, Classifier(), epochs=2)
    module = Classifier()
    resumed, second = fit(tmp_path, module, epochs=2, path=str(tmp_path / "a.ckpt"))
    assert second.global_step == 8
    assert resumed.private.get_epsilon(DELTA) == pytest.approx(whole.private.get_epsilon(DELTA))


def test_the_weights_of_a_checkpoint_are_loaded_into_the_repaired_model(tmp_path: Path) -> None:
    module = Classifier()
    _, first = fit(tmp_path, module, epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = Classifier()
    fit(tmp_path, again, epochs=1, path=str(tmp_path / "a.ckpt"))  # no epoch is left
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_the_training_stops_before_it_goes_beyond_a_target(tmp_path: Path) -> None:
    callback, made = fit(tmp_path, Classifier(), epochs=100, private={"target_epsilon": 4.0, "delta": DELTA})
    spent = callback.private.get_epsilon(DELTA)
    fit(tmp_path, further := Classifier(), epochs=100, max_steps=made.global_step + 1)
    more, _ = fit(tmp_path, Classifier(), epochs=100, max_steps=made.global_step + 1)
    assert further is not None and spent <= 4.0 < more.private.get_epsilon(DELTA)


def test_a_target_that_does_not_last_for_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dpfix.ArgumentError, match=r"target_epsilon=0.01 .* does not last for another step"):
        fit(tmp_path, Classifier(), private={"target_epsilon": 0.01, "delta": DELTA})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 .* raise the batch_size"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs=1"),
        ({"min_epochs": 3, "private": {"target_epsilon": 1.0}}, "target_epsilon together with min_steps or min_epochs"),
    ],
)
def test_trainers_that_break_the_accounting_are_refused(changes: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(dpfix.ArgumentError, match=text):
        fit(tmp_path, Classifier(), **changes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FSDPStrategy", "FSDP1.*Use strategy=ModelParallelStrategy"),
        ("DeepSpeedStrategy", "with 2 processes.*strategy='ddp'"),
    ],
)
def test_strategies_that_are_not_known_are_refused(name: str, text: str, tmp_path: Path) -> None:
    """They start on GPUs only; the callback is told of one before it has done anything."""
    made = SimpleNamespace(strategy=type(name, (), {})(), world_size=2)
    with pytest.raises(dpfix.ArgumentError, match=text):
        PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0).setup(made, Classifier(), "fit")


def test_clipping_by_the_trainer_is_switched_off_and_said(tmp_path: Path) -> None:
    with pytest.warns(dpfix.DPFixWarning, match="gradient_clip_val=1.0 in the Trainer has no effect"):
        fit(tmp_path, Classifier(), gradient_clip_val=1.0)


def test_mixed_precision(tmp_path: Path) -> None:
    callback, made = fit(tmp_path, Classifier(), precision="bf16-mixed")
    assert made.global_step == 8 and callback.private.statement(DELTA).steps == 8


def test_of_several_optimizers_one_is_private(tmp_path: Path) -> None:
    with pytest.raises(dpfix.OptimizerError, match=r"2 of its 2 optimizers train the model.*module="):
        fit(tmp_path, Adversaries())
    callback, _ = fit(tmp_path, Adversaries(), private={"module": "discriminator"})
    assert callback.private.statement(DELTA).steps == 8


def test_a_second_optimizer_that_sees_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dpfix.MisuseError, match=r"SGD.step\(\) was called over a parameter of shape \(6, 6\)"):
        fit(tmp_path, Adversaries(real=True), private={"module": "discriminator"})


def test_arguments_that_are_the_trainers_are_refused() -> None:
    with pytest.raises(dpfix.ArgumentError, match="data_loader is an argument of PrivateCallback"):
        PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0, data_loader=loader())
    with pytest.raises(dpfix.ArgumentError, match="it counts a step for every part of a batch"):
        PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0, max_physical_batch_size=2)


@pytest.mark.parametrize("poisson", [True, False])
def test_make_private_in_configure_optimizers(poisson: bool, tmp_path: Path) -> None:
    """Opacus's documented pattern: only an optimizer comes back from there, and the Trainer owns the loader."""
    given = DPDataLoader.from_data_loader(loader()) if poisson else loader()
    found: list[Any] = []

    class Pattern(Classifier):
        def configure_optimizers(self) -> Any:
            self.trainer.fit_loop.setup_data()
            private = dpfix.make_private_safe(
                module=self,
                optimizer=torch.optim.SGD(self.parameters(), lr=0.1),
                data_loader=self.trainer.train_dataloader,
                noise_multiplier=1.0,
                max_grad_norm=CLIP,
            )
            self.dp = {"model": private[0]}
            found.append(private)
            return private[1]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    made = trainer(tmp_path)
    made.fit(Pattern(), given)
    assert made.global_step == 8 and found[0].statement(DELTA).steps == 8
    made.save_checkpoint(tmp_path / "a.ckpt")
    assert not [k for k in torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"] if "_module" in k]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("call_first", [True, False])
def test_fabric(call_first: bool, precision: Any) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model: Any = Classifier().net
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    data: Any = loader()
    if not call_first:
        (model, optimizer), data = fabric.setup(model, optimizer), fabric.setup_dataloaders(data)
    private = dpfix.make_private_safe(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=CLIP
    )
    model, optimizer, data = private
    if call_first:
        (model, optimizer), data = fabric.setup(model, optimizer), fabric.setup_dataloaders(data)
    for x, y in data:
        optimizer.zero_grad()
        output = model(x)
        assert output.dtype == torch.float32  # Fabric's wrapper has computed in its precision, and gives this back
        fabric.backward(F.cross_entropy(output, y))
        optimizer.step()
    statement = private.statement(DELTA)
    assert statement.steps == 4 and statement.sampling_used == "Poisson"


def test_the_callback_draws_persons(tmp_path: Path) -> None:
    owners = [i % 5 if i < 12 else 5 + i % 3 for i in range(24)]
    callback, _ = fit(tmp_path, Classifier(), private={"privacy_unit": owners, "items_per_unit": 2})
    statement = callback.statement()
    assert (statement.counted, statement.samples, statement.delta) == ("persons", 8, 0.1 / 8)
    assert statement.sampling_rate == 6 / 8 and statement.steps == 4
