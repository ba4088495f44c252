"""What every rank runs in the tests of frameworks on several processes; started by torchrun from ``test_frameworks_on_ranks.py``.

``torchrun --nproc-per-node N -m tests.on_frameworks SCENARIO FOLDER`` writes what rank r saw to ``FOLDER/r.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import dpfix
from dpfix.integrations import huggingface
from dpfix.integrations.lightning import PrivateCallback
from tests.on_ranks import CLIP, RATE, digits, main, network, refused, step, weighted

OF_A_RANK = 3
"""Batch size; of two ranks together, 6."""


def weights(model: nn.Module, prefix: str = "net.") -> dict[str, Tensor]:
    """The whole weights by their names in the network."""
    named: list[tuple[str, Any]] = list(model.named_parameters())
    return {
        name.removeprefix(prefix): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named
    }


# ------------------------------------------------------------------ Lightning


class Classifier(lightning.LightningModule):
    """A common LightningModule, with other weights on every rank; its ``training_step`` calls a part of it."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.net: Any = network(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (weighted if len(batch) > 3 else step)(self.net, batch)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", step(self, batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Spread(Classifier):
    """The same, spread over the processes part by part."""

    def __init__(self) -> None:
        super().__init__(0)
        self.net[0][2].inplace = self.net[3].inplace = False

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        mesh = mesh["data_parallel"]
        for part in (self.net[0], self.net[2], self.net[4]):
            fully_shard(part, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class InPart(Spread):
    """The last layer is left out."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        fully_shard(self.net[0], mesh=mesh["data_parallel"])


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class CallInside(Classifier):
    """Opacus's documented pattern, in which the call cannot see the strategy's wrapper."""

    def configure_optimizers(self) -> Any:
        self.trainer.fit_loop.setup_data()
        loader: Any = self.trainer.train_dataloader
        return call(self, super().configure_optimizers(), loader, wrap_model=False)[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return step(self, batch)


class Recorder(lightning.Callback):
    """What was drawn here, and the weights before and after each step."""

    def __init__(self, private: PrivateCallback) -> None:
        self.private, self.draws, self.states = private, list[list[int]](), list[dict[str, Tensor]]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(weights(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.draws.append(batch[2].tolist() if self.private.private[2].ledger.pending() else [])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(weights(pl_module))


def fit(module: Any, steps: int = 4, loader: Any = None, path: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A training; ``private`` are arguments of the callback, the others those of the Trainer."""
    options = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "cache": False, "seed": 0, "delta": 1e-3}
    private = PrivateCallback(**(options | changes.pop("private", {})))
    recorder = Recorder(private)
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    given: Any = {"strategy": "ddp", "devices": distributed.get_world_size(), "accelerator": "cpu", "max_steps": steps}
    further = changes.pop("callbacks", [])
    trainer = lightning.Trainer(**(quiet | given | changes), callbacks=[private, recorder, *further])
    loader = DataLoader(digits(), batch_size=OF_A_RANK, shuffle=True) if loader is None else loader
    error = refused(lambda: trainer.fit(module, loader, DataLoader(digits(12), 4), ckpt_path=path))
    if path is None and changes.get("default_root_dir"):
        trainer.save_checkpoint(Path(changes["default_root_dir"]) / "a.ckpt")
    begun = "private" in vars(private)
    return {
        "told": error,
        "draws": recorder.draws,
        "states": recorder.states,
        "after": weights(module),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "history": list(private.private.privacy_engine.accountant.history) if begun else [],
        "epsilon": private.private.get_epsilon(1e-3) if begun and not error else 0.0,
        "report": private.private.report.details() if begun else "",
        "plain": type(trainer.strategy.model) is type(module) and "training_step" not in vars(module),
    }


def in_parts() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=distributed.get_world_size(), tensor_parallel_size=1)


def with_lightning(rank: int, folder: Path) -> dict[str, Any]:
    """Trainings by a Trainer, and what it refuses."""
    found = {
        "ddp, noise": fit(Classifier(), 6, private={"noise_multiplier": 2.0, "seed": None}),
        "ddp, few samples": fit(Classifier(), 8, DataLoader(digits(), batch_size=1)),
        "ddp, own sampler": fit(
            Classifier(),
            2,
            DataLoader(digits(), 6, sampler=SubsetRandomSampler(range(40))),
            use_distributed_sampler=False,
        ),
        "ddp, target": fit(Classifier(), 500, private={"noise_multiplier": 2.0, "target_epsilon": 2.0}),
        "spread, noise": fit(Spread(), 5, strategy=in_parts(), private={"noise_multiplier": 2.0, "seed": None}),
    }
    saved = {"noise_multiplier": 2.0, "seed": None}
    found["ddp, saved"] = fit(Classifier(), 3, private=saved, default_root_dir=folder)
    found["ddp, gone on"] = fit(Classifier(), 5, private=saved, default_root_dir=folder, path=folder / "a.ckpt")
    if rank == 0:
        dpfix.Budget(folder / "data.budget.json", epsilon=4.0, delta=1e-3)
    distributed.barrier()
    budget = dpfix.Budget(folder / "data.budget.json")
    found["ddp, budget"] = fit(Classifier(), 500, private={"noise_multiplier": 1.0, "budget": budget})
    return found | {f"refused, {name}": {"told": text} for name, text in refused_by_lightning(rank, folder).items()}


def refused_by_lightning(rank: int, folder: Path) -> dict[str, str]:
    saving = {"callbacks": [ModelCheckpoint(folder)], "enable_checkpointing": True}
    picked = DataLoader(digits(), batch_size=3, sampler=SubsetRandomSampler(range(40)))
    asked: dict[str, Callable[[], dict[str, Any]]] = {
        "module": lambda: fit(Classifier(), private={"module": "net"}),
        "by hand": lambda: fit(ByHand()),
        "own sampler": lambda: fit(Classifier(), loader=picked),
        "spread in part": lambda: fit(InPart(), strategy=in_parts()),
        "spread, checkpoints": lambda: fit(Spread(), strategy=in_parts(), **saving),
        "spread, going on": lambda: fit(Spread(), strategy=in_parts(), path=folder / "a.ckpt"),
        "call inside": lambda: fit_alone(CallInside()),
        "call inside, no sampler": lambda: fit_alone(CallInside(), use_distributed_sampler=False),
    }
    return {name: act()["told"] for name, act in asked.items()}


def fit_alone(module: Any, **changes: Any) -> dict[str, str]:
    """A training without the callback."""
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(strategy="ddp", devices=2, accelerator="cpu", max_steps=2, **quiet, **changes)
    return {"told": refused(lambda: trainer.fit(module, DataLoader(digits(), batch_size=OF_A_RANK)))}


def leave_one_out(rank: int, folder: Path) -> dict[str, Any]:
    """The first step of one draw, with everybody and with one sample that counts for nothing."""
    found = {}
    for left_out in (-1, *LEFT_OUT):
        weight = torch.full((60,), 100.0)
        weight[left_out if left_out >= 0 else 60 :][:1] = 0.0
        data = TensorDataset(*digits().tensors, weight)
        loader = DataLoader(data, batch_size=10)
        found[f"ddp without {left_out}"] = fit(Classifier(), 1, loader)
        found[f"spread without {left_out}"] = fit(Spread(), 1, loader, strategy=in_parts())
        found[f"transformers without {left_out}"] = with_trainer(
            folder, max_steps=1, weight=weight, per_device_train_batch_size=10
        )
        accelerator = Accelerator(cpu=True)
        private = call(*accelerator.prepare(*fresh()[:2], loader), training_step=weighted)
        found[f"accelerate without {left_out}"] = loop(private, private, accelerator.backward, 1)
    return found


LEFT_OUT = range(4)
"""Samples that are left out, one after the other."""


# ------------------------------------------------------------------ loops of one's own


def call(*objects: Any, **changes: Any) -> dpfix.PrivateTraining:
    model, optimizer, loader = objects
    given: Any = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "training_step": step, "cache": False, "seed": 0}
    return dpfix.make_private_safe(module=model, optimizer=optimizer, data_loader=loader, **(given | changes))


def loop(
    private: dpfix.PrivateTraining, objects: Any, backward: Callable[[Tensor], Any], steps: int = 3
) -> dict[str, Any]:
    """Steps with what may be wrapped around the private objects."""
    model, optimizer, loader = objects
    inner, ledger = private[1].guard.guarded.module, private[2].ledger
    states, draws = [whole(inner)], list[list[int]]()
    while len(draws) < steps:
        for batch in loader:
            optimizer.zero_grad()
            backward((weighted if len(batch) > 3 else step)(model, batch))
            draws.append(batch[2].tolist() if ledger.pending() else [])
            optimizer.step()
            states.append(whole(inner))
            if len(draws) == steps:
                break
    return {"told": "", "draws": draws, "states": states, "history": private.privacy_engine.accountant.history}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return weights(model, "module.")


def fresh(batch_size: int = OF_A_RANK) -> tuple[nn.Module, Any, Any]:
    model: Any = network(0)
    model[0][2].inplace = model[3].inplace = False
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return model, optimizer, DataLoader(digits(), batch_size=batch_size, shuffle=True)


def with_fabric(rank: int) -> dict[str, Any]:
    fabric = lightning.Fabric(accelerator="cpu", devices=distributed.get_world_size(), strategy="ddp")
    fabric.launch()
    model, optimizer, loader = fresh()
    prepared = (*fabric.setup(model, optimizer), fabric.setup_dataloaders(loader))
    private = call(*prepared)
    found = loop(private.with_objects(private[0], private[1], private[2]._dataloader), private, fabric.backward)
    model, optimizer, loader = fresh()
    loud = call(*fabric.setup(model, optimizer), fabric.setup_dataloaders(loader), noise_multiplier=2.0, seed=None)
    noise = loop(loud.with_objects(loud[0], loud[1], loud[2]._dataloader), loud, fabric.backward, 5)

    def afterwards() -> None:
        private = call(*fresh())
        model, optimizer = fabric.setup(private[0], private[1])
        loop(private, (model, optimizer, private[2]), fabric.backward)

    return {"fabric": found, "fabric, noise": noise, "refused, fabric afterwards": {"told": refused(afterwards)}}


def with_accelerate(rank: int) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    found, (model, optimizer, loader) = {}, fresh(6)
    private = call(*accelerator.prepare(model, optimizer), loader)
    again = accelerator.prepare(private[2])
    found["accelerate, loader afterwards"] = loop(private, (*tuple(private)[:2], again), accelerator.backward)
    loud = call(*accelerator.prepare(*fresh()), noise_multiplier=2.0, seed=None)
    found["accelerate, noise"] = loop(loud, loud, accelerator.backward, 5)
    model, optimizer, loader = fresh()
    mine = call(model, optimizer, loader)
    found["refused, accelerate afterwards"] = {
        "told": refused(lambda: loop(mine, accelerator.prepare(*mine), accelerator.backward))
    }
    only_loader: Any = accelerator.prepare(fresh()[2])
    found["refused, accelerate, the loader only"] = {"told": refused(lambda: call(*fresh()[:2], only_loader))}
    AcceleratorState._reset_state()
    parts = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    private = call(*parts.prepare(*fresh(6)))
    return found | {"accelerate, split": loop(private, private, parts.backward)}


def with_fsdp(rank: int) -> dict[str, Any]:
    """Accelerate takes FSDP only where there are accelerators; here it is told that there are."""
    AcceleratorState._reset_state()
    found = {}
    model, _, loader = fresh(6)
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(flat.parameters(), lr=RATE)
    found["refused, FSDP1"] = {"told": refused(lambda: call(flat, optimizer, loader))}
    names = ["Conv2d", "Linear"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    model, optimizer, loader = fresh(6)
    prepared = accelerator.prepare(model, optimizer)
    assert accelerator.is_fsdp2, (accelerator.distributed_type, plugin.fsdp_version)
    assert all(isinstance(p, DTensor) for p in prepared[0].parameters())
    private = call(*prepared, loader)
    found["accelerate, FSDP2"] = loop(private, private, accelerator.backward)
    mine = call(*fresh(6))
    found["refused, FSDP2 afterwards"] = {
        "told": refused(lambda: loop(mine, (*accelerator.prepare(mine[0], mine[1]), mine[2]), accelerator.backward))
    }
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    AcceleratorState._reset_state()
    return found


# ------------------------------------------------------------------ transformers


class WithLoss(nn.Module):
    """Computes its loss itself, as the models of transformers do."""

    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        self.net, self.coupled = network(0), coupled

    def forward(self, x: Tensor, labels: Tensor, index: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        if self.coupled:
            out = out - out.mean(0)
        losses = nn.functional.cross_entropy(out, labels, reduction="none")
        return {"loss": (losses if weight is None else losses * weight).mean(), "logits": out}


class Recorded(Trainer):
    """Tells what is drawn here."""

    record: Callable[[Any], None]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.record(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


class OfOutputs(Recorded):
    """The loss is computed from the outputs, and divided by what the Trainer passes on."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        losses = nn.functional.cross_entropy(outputs["logits"], inputs["labels"], reduction="sum")
        loss = losses / (num_items_in_batch or len(inputs["labels"]))
        return (loss, outputs) if return_outputs else loss


class States(TrainerCallback):
    def __init__(self, model: nn.Module) -> None:
        self.model, self.states = model, list[dict[str, Tensor]]()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.states.append(weights(self.model))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.states.append(weights(self.model))


def with_trainer(folder: Path, cls: type = Recorded, coupled: bool = False, **changes: Any) -> dict[str, Any]:
    """A training by a Trainer; ``private`` are arguments of the callback."""
    model, options = WithLoss(coupled), {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "cache": False, "seed": 0}
    if "label_smoothing_factor" in changes:
        vars(model)["config"] = SimpleNamespace()
    optimizer, states = torch.optim.SGD(model.parameters(), lr=RATE), States(model)
    private = huggingface.PrivateCallback(**(options | changes.pop("private", {})))
    resumed = changes.pop("resumed", None)
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 4}
    own = {"per_device_train_batch_size": OF_A_RANK, "lr_scheduler_type": "constant", "remove_unused_columns": False}
    data: list[dict[str, Any]] = [{"x": x, "labels": int(y), "index": int(i)} for x, y, i in digits()]
    for sample, weight in zip(data, changes.pop("weight", ()), strict=False):
        sample["weight"] = weight

    def record(inputs: Any) -> None:
        draws.append(inputs["index"].tolist() if private.private[2].ledger.pending() else [])

    def train() -> None:
        arguments = TrainingArguments(str(folder), **(quiet | own | changes))
        trainer = cls(model, arguments, train_dataset=data, callbacks=[private, states], optimizers=(optimizer, None))
        trainer.record = record
        trainer.train(resume_from_checkpoint=resumed)

    draws: list[list[int]] = []
    error = refused(train)
    history = [] if error else list(private.private.privacy_engine.accountant.history)
    return {"told": error, "draws": draws, "states": states.states, "history": history}


def with_transformers(rank: int, folder: Path) -> dict[str, Any]:
    saving = {"save_strategy": "steps", "save_steps": 3, "private": {"noise_multiplier": 2.0, "seed": None}}
    return {
        "transformers, outputs": with_trainer(folder, OfOutputs),
        "transformers, noise": with_trainer(folder, max_steps=6, **saving),
        "transformers, gone on": with_trainer(
            folder, max_steps=8, resumed=str(folder / "checkpoint-6"), private=saving["private"]
        ),
        "refused, transformers, smoothing": with_trainer(folder, label_smoothing_factor=0.1),
        "refused, transformers, accumulation": with_trainer(folder, gradient_accumulation_steps=2),
    }


def few(rank: int, size: int) -> dict[str, Any]:
    """One training of each kind."""
    folder, accelerator = Path(sys.argv[2]), Accelerator(cpu=True)
    private = call(*accelerator.prepare(*fresh()))
    wrong = {"max_grad_norm": -1.0 if rank == 1 else 1.0}
    return {
        "accelerate, loader too": loop(private, private, accelerator.backward),
        "ddp": fit(Classifier()),
        "spread": fit(Spread(), strategy=in_parts()),
        "transformers": with_trainer(folder),
        "refused, on rank 1": fit(Classifier(), private=wrong),
        "refused, transformers, on rank 1": with_trainer(folder, coupled=rank == 1),
    }


def everything(rank: int, size: int) -> dict[str, Any]:
    """All frameworks, in one start."""
    folder = Path(sys.argv[2])
    found = with_lightning(rank, folder) | with_fabric(rank) | with_accelerate(rank)
    return found | with_transformers(rank, folder / "out") | with_fsdp(rank)


SCENARIOS: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "few": few,
    "everything": everything,
    "leave one out": lambda rank, size: leave_one_out(rank, Path(sys.argv[2])),
}


if __name__ == "__main__":
    main(SCENARIOS)
