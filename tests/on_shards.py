"""What every rank runs in the tests of models that ``fully_shard`` has spread; started by torchrun from ``test_sharded.py``.

``torchrun --nproc-per-node N -m tests.on_shards SCENARIO FOLDER`` writes what rank r saw to ``FOLDER/r.pt``.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.instrument import sharded as instrument
from dpfix.training import sharded as noise
from tests.on_ranks import digits, main, refused

CLIP, RATE = 0.5, 0.5
WORDS, LENGTH = 23, 6


def mlp() -> nn.Module:
    """Widths that two ranks and four cannot share evenly; a rank of four has nothing of the last bias."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.ReLU(), nn.Linear(15, 10), nn.Tanh(), nn.Linear(10, 10))


class Transformer(nn.Module):
    """Torch's own encoder, whose attention holds its parameters itself, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.places = nn.Parameter(torch.randn(LENGTH, 12) / 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(12, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class RootMeanSquare(nn.Module):
    """A normalisation as language models bring it themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    """Attention with fewer keys than queries (GQA), and a gated network."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.before, self.after = RootMeanSquare(width), nn.RMSNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((width, 20), (width, 20), (20, width)))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before(x)
        q = self.q(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand(-1, self.heads, -1, -1) for t in self.kv(seen).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        seen = self.after(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))


class Llama(nn.Module):
    """A small language model with one table for the words that come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(12)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sentences(samples: int = 60) -> TensorDataset:
    """Words, a label and the index."""
    g = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(WORDS, (samples, LENGTH), generator=g), torch.randint(10, (samples,), generator=g)
    return TensorDataset(ids, labels, torch.arange(samples))


def classified(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_word(model: nn.Module, batch: Any) -> Tensor:
    """Every sample's mean over its words, averaged."""
    out = model(batch[0][:, :-1])
    return F.cross_entropy(out.transpose(1, 2), batch[0][:, 1:])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[..., Tensor]]] = {
    "MLP": (mlp, digits, classified),
    "transformer": (Transformer, sentences, classified),
    "Llama": (Llama, sentences, next_word),
}
"""Name -> model, data, step."""


def made(name: str) -> nn.Module:
    """A model with the same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return MODELS[name][0]()


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    """Layer by layer, or block by block, and the rest; a table that is tied stays with the rest."""
    options = {"mesh": init_device_mesh("cpu", (distributed.get_world_size(),))} | options
    for child in getattr(module, "blocks", module.children()):
        if any(True for _ in child.parameters()):
            fully_shard(child, **options)
    return fully_shard(module, **options)


def call(name: str = "MLP", batch_size: int = 6, **changes: Any) -> dict[str, Any]:
    """Arguments of a call."""
    _, data, step = MODELS[name]
    model = changes.pop("module", None)
    model = sharded(made(name)) if model is None else model
    given: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=RATE),
        "data_loader": DataLoader(data(), batch_size=batch_size),
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP,
        "training_step": step,
        "cache": False,
        "seed": 0,
    }
    return given | changes


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights by their names in the network."""
    return {
        k.removeprefix("_module."): v.full_tensor() if isinstance(v, DTensor) else v.clone()
        for k, v in model.state_dict().items()
    }


def train(given: dict[str, Any], steps: int, between: Callable[[nn.Module], Any] | None = None) -> dict[str, Any]:
    """Some steps: what was drawn here, the weights before and after each, and what was accounted."""
    training = dpfix.make_private_safe(**given)
    model, optimizer, loader = training
    step = given["training_step"]
    states, draws = [weights(model)], []
    while len(draws) < steps:
        for batch in loader:
            optimizer.zero_grad()
            step(model, batch).backward()
            draws.append(batch[2].tolist() if loader.ledger.pending() else [])
            optimizer.step()
            states.append(weights(model))
            if between is not None:
                between(model)
            if len(draws) == steps:
                break
    return {
        "states": states,
        "draws": draws,
        "engine": training.plan.engine,
        "history": training.privacy_engine.accountant.history,
        "epsilon": training.get_epsilon(1e-3),
        "report": training.report.details(),
        "checked": optimizer.guard.real_steps.agenda.checked,
    }


def loop(training: dpfix.PrivateTraining, batches: Iterable[Any], step: Callable[..., Tensor] = classified) -> None:
    """The training loop."""
    for batch in batches:
        training[1].zero_grad()
        step(training[0], batch).backward()
        training[1].step()


def misuse(act: Callable[[dpfix.PrivateTraining], None], **changes: Any) -> dict[str, Any]:
    """How a first step ends, and whether it was released."""
    training = dpfix.make_private_safe(**call(batch_size=20, **changes))
    before = weights(training[0])
    told = refused(lambda: act(training))
    kept = all(torch.equal(v, before[k]) for k, v in weights(training[0]).items())
    return {"told": told, "kept": kept}


def evaluation(model: nn.Module) -> None:
    """FSDP leaves the root's parameters whole after it."""
    model.eval()
    with torch.no_grad():
        model(digits(3)[:][0])
    model.train()


def with_frozen() -> nn.Module:
    model = made("MLP")
    for p in (*model[1].parameters(), model[5].bias):
        p.requires_grad_(False)
    return sharded(model)


def trainings(rank: int, size: int) -> dict[str, Any]:
    """Trainings that work, and what is refused."""
    found: dict[str, Any] = {name: train(call(name), 4) for name in MODELS}
    found["noise"] = train(call(noise_multiplier=2.0, seed=None), 5)
    found["few samples"] = train(call(batch_size=2), 8)
    found["evaluation"] = train(call(batch_size=20), 2, evaluation)
    found["frozen"] = train(call(module=with_frozen()), 2)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for name in ("MLP", "transformer"):
        found[f"half precision, {name}"] = train(call(name, module=sharded(made(name), mp_policy=half)), 2)
    found["groups"] = train(call(clipping="per_group", max_grad_norm={"1.*": 0.1, "*": 0.5}), 2)
    found["late"] = coupled_late(rank)
    found["looks"], found["changed"] = looks(rank, size), changed(rank)
    found |= {"saved": save(rank, size), "gone on": go_on(rank, size)}
    return found | {"refused": refusals(rank, size), "misused": misuses(rank, size)}


def coupled(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out - out.mean(0), batch[1])


def coupled_late(rank: int) -> dict[str, Any]:
    """How a training ends whose loss couples samples in one step alone, on one rank, after steps that are looked at anyway."""
    training = dpfix.make_private_safe(**call(batch_size=20))

    def act() -> None:
        batches = itertools.chain.from_iterable(training[2] for _ in range(4))
        for number, batch in enumerate(batches, 1):
            loop(training, [batch], coupled if (number, rank) == (8, 1) else classified)

    told = refused(act)
    return {"told": told, "steps": sum(steps for *_, steps in training.privacy_engine.accountant.history)}


def looks(rank: int, size: int) -> dict[str, list[int]]:
    """How often whole parameters were put together in each of three steps, the last of which the last rank alone looks at."""
    training = dpfix.make_private_safe(**call(batch_size=20))
    agenda, gathered, checked = training[1].guard.real_steps.agenda, [], []
    for number, batch in enumerate(training[2]):
        agenda.due = lambda seen, number=number: (rank, number) == (size - 1, 2)
        with mock.patch.object(instrument, "_together", wraps=instrument._together) as together:
            loop(training, [batch])
        gathered.append(together.call_count)
        checked.append(agenda.checked)
    return {"gathered": gathered, "checked": checked}


def changed(rank: int) -> list[str]:
    """What a training warns of whose model is another one in ``optimizer.step()`` than it was in ``backward()``."""
    model, optimizer, loader = dpfix.make_private_safe(**call(batch_size=20))
    batch = next(iter(loader))
    optimizer.zero_grad()
    classified(model, batch).backward()
    if rank == 0:
        model.eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(one.message) for one in told]


def refusals(rank: int, size: int) -> dict[str, str]:
    """Calls that have to fail on every rank."""
    mesh = init_device_mesh("cpu", (size,))

    def ignoring() -> nn.Module:
        model = made("MLP")
        return fully_shard(model, mesh=mesh, ignored_params={model[5].bias})

    def in_part() -> nn.Module:
        model = made("MLP")
        fully_shard(model[1], mesh=mesh)
        return model

    own = torch.Generator()
    halved = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    asked: dict[str, Callable[[], dict[str, Any]]] = {
        "engine": lambda: call(grad_sample_mode="vmap"),
        "parts": lambda: call(max_physical_batch_size=2),
        "generator": lambda: call(noise_generator=own),
        "adaptive": lambda: call(
            clipping="adaptive",
            target_unclipped_quantile=0.5,
            clipbound_learning_rate=0.2,
            max_clipbound=1.0,
            min_clipbound=0.1,
            unclipped_num_std=2.0,
        ),
        "secure mode": lambda: call(secure_mode=True, seed=None),
        "generator on rank 1": lambda: call(noise_generator=own if rank else None),
        "ignored": lambda: call(module=ignoring()),
        "in part": lambda: call(module=in_part()),
        "batch norm": lambda: call(module=sharded(halved)),
        "order": lambda: call(poisson_sampling=False),
        "noise": lambda: call(noise_multiplier=1.0 + rank),
    }
    return {name: refused(lambda given=given: dpfix.make_private_safe(**given())) for name, given in asked.items()}


def misuses(rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Steps that are released on no rank."""

    def penalty(training: dpfix.PrivateTraining) -> None:
        inner = training[0]._module
        batch = next(iter(training[2]))
        training[1].zero_grad()
        out = training[0](batch[0])
        inner[5].unshard()
        (F.cross_entropy(out, batch[1]) + inner[5].weight.square().sum()).backward()
        training[1].step()

    def no_noise(training: dpfix.PrivateTraining) -> None:
        add = noise.add_normal
        noise.add_normal = add if rank == 0 else lambda *_: None  # type: ignore[assignment]
        try:
            loop(training, training[2])
        finally:
            noise.add_normal = add

    def in_parts(training: dpfix.PrivateTraining) -> None:
        made = BatchMemoryManager(data_loader=training[2], max_physical_batch_size=2, optimizer=training[1])
        with made as batches:
            loop(training, batches)

    def clip_norm(training: dpfix.PrivateTraining) -> None:
        training[1].max_grad_norm = CLIP / (1 + rank)
        loop(training, training[2])

    return {
        "loss": misuse(lambda t: loop(t, t[2], coupled if rank == 1 else classified)),
        "penalty": misuse(penalty),
        "no noise": misuse(no_noise, noise_multiplier=1.0),
        "parts": misuse(in_parts),
        "clip norm": misuse(clip_norm),
    }


def adam(model: nn.Module) -> dict[str, Any]:
    return {"module": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.01)}


def states(optimizer: Any) -> list[Tensor]:
    """What Adam has of every parameter."""
    held = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    found = (value for state in held for _, value in sorted(state.items()))
    return [value.full_tensor() if isinstance(value, DTensor) else value.clone() for value in found]


def save(rank: int, size: int) -> dict[str, Any]:
    """Some steps, and the state after them."""
    training = dpfix.make_private_safe(**call(noise_multiplier=2.0, batch_size=20, **adam(sharded(made("MLP")))))
    loop(training, training[2])
    checkpoint.save({"training": training}, checkpoint_id=Path(sys.argv[2]) / "saved")
    file = refused(
        lambda: training.privacy_engine.save_checkpoint(
            path=Path(sys.argv[2]) / "file.pt", module=training[0], optimizer=training[1]
        )
    )
    found = seen_of(training)
    checkpoint.load({"training": training}, checkpoint_id=Path(sys.argv[2]) / "saved")
    return found | {"file": file, "loaded again": seen_of(training)["history"]}


def seen_of(training: dpfix.PrivateTraining) -> dict[str, Any]:
    history = list(training.privacy_engine.accountant.history)
    return {"weights": weights(training[0]), "adam": states(training[1]), "history": history}


def go_on(rank: int, size: int) -> dict[str, Any]:
    """Go on from the state, on a model that is spread where there are several ranks."""
    model = made("MLP")
    with torch.no_grad():
        model[1].weight.zero_()
    model = sharded(model) if size > 1 else model
    training = dpfix.make_private_safe(**call(noise_multiplier=2.0, batch_size=20, **adam(model)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoint.load({"training": training}, checkpoint_id=Path(sys.argv[2]) / "saved")
    found = seen_of(training) | {"told": [str(w.message) for w in told]}
    loop(training, training[2])
    return found | {"then": seen_of(training)}


LEFT_OUT = range(6)


def leave_one_out(rank: int, size: int) -> dict[str, Any]:
    """One step on all samples, and steps in which the gradient of one is zero; others are a hundred times as large."""

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[3]).mean()

    found = {}
    for left_out in (-1, *LEFT_OUT):
        times = torch.ones(60)
        times[::3] = 100.0
        if left_out >= 0:
            times[left_out] = 0.0
        data = TensorDataset(*digits().tensors, times)
        loader = DataLoader(data, batch_size=20)
        found[str(left_out)] = train(call(data_loader=loader, training_step=weighted), 1)
    return found


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "trainings": trainings,
    "leave one out": leave_one_out,
    "save": save,
    "go on": go_on,
}


if __name__ == "__main__":
    main(SCENARIOS)
