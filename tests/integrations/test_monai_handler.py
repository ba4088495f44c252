"""Epsilon among the metrics of ignite's and MONAI's engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from monai.engines import GanTrainer, SupervisedTrainer
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.integrations.monai import PrivacyHandler
from tests.helpers import points, setting, train

DELTA = 1e-3


def ignite_trainer(**changes: Any) -> tuple[Any, Engine]:
    private = dpfix.make_private_safe(**setting(**changes))
    model, optimizer, _ = private
    return private, create_supervised_trainer(model, optimizer, F.cross_entropy)


def test_epsilon_is_there_when_an_epoch_is_completed() -> None:
    private, engine = ignite_trainer()
    seen: list[float] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics["epsilon"]))
    PrivacyHandler(private, delta=DELTA).attach(engine)  # after the handlers that read it
    engine.run(private[-1], max_epochs=2)
    assert 0 < seen[0] < seen[1] == engine.state.metrics["epsilon"] == private.get_epsilon(DELTA)


def test_delta_is_a_tenth_of_one_sample() -> None:
    private, _ = ignite_trainer()
    assert PrivacyHandler(private).delta == pytest.approx(0.1 / 24)


def test_the_run_ends_before_it_goes_beyond_a_target() -> None:
    private, engine = ignite_trainer()
    PrivacyHandler(private, delta=DELTA, target_epsilon=5.0).attach(engine)
    engine.run(private[-1], max_epochs=100)
    assert engine.state.metrics["epsilon"] == private.get_epsilon(DELTA) <= 5.0
    longer, _ = ignite_trainer()
    train(longer, engine.state.iteration + 1)
    assert longer.get_epsilon(DELTA) > 5.0


def test_a_target_that_is_spent_already_is_refused() -> None:
    private, engine = ignite_trainer()
    PrivacyHandler(private, delta=DELTA, target_epsilon=0.01).attach(engine)
    engine.logger.disabled = True
    with pytest.raises(dpfix.ArgumentError, match="does not last for another step"):
        engine.run(private[-1], max_epochs=1)


def volumes() -> list[dict[str, Tensor]]:
    return [{"image": torch.randn(1, 8, 8), "label": (torch.randn(1, 8, 8) > 0).float()} for _ in range(8)]


def supervised(**changes: Any) -> tuple[Any, SupervisedTrainer]:
    net, loss = UNet(2, 1, 1, channels=(4, 8), strides=(2,), norm="batch"), DiceLoss(sigmoid=True)
    private = dpfix.make_private_safe(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(volumes(), batch_size=4),
        criterion=loss,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model, optimizer, loader = private
    handlers = [PrivacyHandler(private, delta=DELTA)]
    return private, SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=loader,
        network=model,
        optimizer=optimizer,
        loss_function=loss,
        train_handlers=handlers,
        **changes,
    )


def test_among_the_handlers_of_a_monai_trainer() -> None:
    private, trainer = supervised()
    trainer.run()
    assert trainer.state.metrics["epsilon"] == private.get_epsilon(DELTA)


def test_a_scaler_is_refused_at_once() -> None:
    private, engine = ignite_trainer()
    engine.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    with pytest.raises(dpfix.MisuseError, match=r"its GradScaler scales the loss.*enabled=False"):
        PrivacyHandler(private).attach(engine)
    engine.scaler = torch.amp.GradScaler("cpu", enabled=False)  # type: ignore[attr-defined]
    PrivacyHandler(private).attach(engine)


def test_a_gan_trainer_makes_as_many_fakes_as_were_drawn() -> None:
    generator, discriminator = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    private = dpfix.make_private_safe(
        module=discriminator,
        optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1),
        data_loader=DataLoader(points(), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model, optimizer, loader = private

    def for_discriminator(fakes: Tensor, real: Tensor) -> Tensor:
        return (F.softplus(-model(real)) + F.softplus(model(fakes.detach()))).mean()

    trainer = GanTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=loader,
        g_network=generator,
        g_optimizer=torch.optim.SGD(generator.parameters(), lr=0.1),
        g_loss_function=lambda fakes: F.softplus(-model(fakes)).mean(),
        d_network=model,
        d_optimizer=optimizer,
        d_loss_function=for_discriminator,
        latent_shape=4,
        d_prepare_batch=lambda batch, device, non_blocking=False: batch[0].to(device),
    )
    PrivacyHandler(private, delta=DELTA).attach(trainer)
    before = generator.weight.detach().clone()
    trainer.run()
    assert not torch.equal(before, generator.weight)
    assert private.statement(DELTA).steps == 8
    assert trainer.state.metrics["epsilon"] == private.get_epsilon(DELTA)
