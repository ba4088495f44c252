"""What every rank runs in the tests of training on several processes; started by torchrun from ``test_distributed.py``.

``torchrun --nproc-per-node N -m tests.on_ranks SCENARIO FOLDER`` writes what rank r saw to ``FOLDER/r.pt``.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.schedulers import ExponentialGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset, random_split

import dpfix
from dpfix.choose import physical

CLIP, RATE = 0.5, 0.5
OWNERS = [i % 7 if i < 30 else 7 + i % 11 for i in range(60)]
"""To whom each of the digits belongs in the trainings by persons."""


def digits(samples: int = 60) -> TensorDataset:
    """Scikit-learn's digits: image, label and index."""
    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x[:samples], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(images, torch.as_tensor(y[:samples]), torch.arange(samples))


def network(seed: int | None = None) -> nn.Module:
    """A small convolutional network; with other weights on every rank, although the generators are the same."""
    with torch.random.fork_rng():
        torch.manual_seed(distributed.get_rank() if seed is None else seed)
        convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
        return nn.Sequential(convolution, nn.Flatten(), nn.Linear(144, 16), nn.ELU(inplace=True), nn.Linear(16, 10))


def step(model: nn.Module, batch: Any) -> Tensor:
    """From a batch to its loss."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def call(batch_size: int = 6, **changes: Any) -> dict[str, Any]:
    """Arguments of a call, with the weights of rank 0 on every rank."""
    model = changes.pop("module", None) or DPDDP(network())
    given: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=RATE),
        "data_loader": DataLoader(digits(), batch_size=batch_size),
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP,
        "training_step": step,
        "cache": False,
        "seed": 0,
    }
    return given | changes


CLIPPING: dict[str, dict[str, Any]] = {
    "automatic": {"clipping": "automatic", "grad_sample_mode": "bookkeeping"},
    "automatic, gradients kept": {"clipping": "automatic", "grad_sample_mode": "hooks"},
    "groups": {
        "clipping": "per_group",
        "max_grad_norm": {"module.0.*": 0.1, "*": 0.5},
        "grad_sample_mode": "bookkeeping",
    },
    "groups, gradients kept": {
        "clipping": "per_group",
        "max_grad_norm": {"module.0.*": 0.1, "*": 0.5},
        "grad_sample_mode": "vmap",
    },
}
"""Ways to clip that work on several processes."""
ADAPTIVE = {
    "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0, "min_clipbound": 0.01,
    "unclipped_num_std": 0.3,
}  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by their names in the network."""
    return {k.removeprefix("_module.").removeprefix("module."): v.clone() for k, v in model.state_dict().items()}


def summed(model: nn.Module, batch: Any) -> Tensor:
    """The loss as a sum over the samples."""
    return step(model, batch) * len(batch[0])


def train(
    given: dict[str, Any], steps: int, managed: int = 0, called: nn.Module | None = None, memory: int = 0
) -> dict[str, Any]:
    """Some steps: what was drawn here, the weights before and after each, and what was accounted.

    Args:
        managed: samples at a time, if a ``BatchMemoryManager`` is used.
        called: the model that the loop calls; the returned one if not given.
        memory: samples for which there is memory, where it is short.
    """
    training = dpfix.make_private_safe(**given)
    model, optimizer, loader = training
    if not given.get("wrap_model", True):
        model = given["module"]  # what comes back are Opacus's hooks on it
    states, draws, drawn = [weights(model)], [], []

    def released(_: Any) -> None:
        draws.append(list(dict.fromkeys(drawn)))  # what was begun again was delivered twice
        drawn.clear()

    def enough(module: nn.Module, args: Any) -> None:
        if len(args[0]) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if memory:
        given["module"].register_forward_pre_hook(enough)
    optimizer.attach_step_hook(released)
    batches: Any = loader
    if managed:
        manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=managed, optimizer=optimizer)
        batches = manager.__enter__()
    while len(draws) < steps:
        for batch in batches:
            optimizer.zero_grad()
            given.get("training_step", step)(called or model, batch).backward()
            if loader.ledger.pending():  # not what an empty part of a batch delivers
                drawn += batch[2].tolist()
            optimizer.step()
            if len(draws) == len(states):
                states.append(weights(model))
            if len(draws) == steps:
                break
    assert isinstance(training.privacy_engine.accountant.history, list)
    return {
        "states": states,
        "draws": draws,
        "engine": training.plan.engine,
        "physical": training.plan.physical,
        "limit": loader.ledger.limit,
        "history": training.privacy_engine.accountant.history,
        "epsilon": training.get_epsilon(1e-3),
        "report": training.report.details(),
    }


def positions_in_opacus(samples: int = 40) -> list[list[int]]:
    """Which positions of its part Opacus's sampler draws on this rank, when all ranks have set the same seed."""
    sampler = DistributedUniformWithReplacementSampler(total_size=samples, sample_rate=0.3, shuffle=False)
    part = list(range(distributed.get_rank(), samples, distributed.get_world_size()))
    return [[part.index(i) for i in drawn.tolist()] for drawn in sampler]


def trainings(rank: int, size: int) -> dict[str, Any]:
    """Trainings that work."""
    torch.manual_seed(0)
    opacus = positions_in_opacus()
    found = {mode: train(call(grad_sample_mode=mode), 4) for mode in ("auto", "vmap", "microbatch", "hooks")}
    found["Opacus"] = {"positions": opacus}
    found["few samples"] = train(call(batch_size=2), 12)
    found["memory manager"] = train(call(batch_size=20), 3, managed=4)
    found["lack of memory"] = train(call(batch_size=20, max_physical_batch_size="auto"), 3, memory=(5, 30)[rank])
    found["sum"] = train(call(loss_reduction="sum", training_step=summed, grad_sample_mode="auto"), 3)
    found["noise"] = train(call(noise_multiplier=2.0, seed=None), 6)
    found |= {name: train(call(**options), 3) for name, options in CLIPPING.items()}
    sampler = DistributedSampler(digits(), seed=1)
    loader = DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
    found["distributed sampler"] = train(call(data_loader=loader), 3)
    found["persons"] = train(call(batch_size=4, privacy_unit=OWNERS), 6)
    found["one person"] = train(call(batch_size=1, privacy_unit=OWNERS), 12)
    found["persons, distributed sampler"] = train(call(data_loader=loader, privacy_unit=OWNERS), 3)
    found["persons, memory manager"] = train(call(batch_size=18, privacy_unit=OWNERS), 2, managed=2)
    return found


def habitual(module: nn.Module | None = None, **options: Any) -> DistributedDataParallel:
    """A network in torch's wrapper, whose first forward pass still waits for its backward pass, as after a look at a shape."""
    model = DistributedDataParallel(module or network(), **options)
    model(digits(2)[:][0])
    return model


def sent(work: Callable[[], Any]) -> int:
    """How many messages the ranks exchange in some work, whoever sends them."""
    with torch.autograd.profiler.profile() as recorded:
        work()
    return sum(event.name.startswith("gloo:") for event in recorded.function_events or ())


def messages() -> dict[str, Any]:
    """Messages of a batch in parts: of every model call and backward pass, of every step, and of torch's own wrapper."""
    model, optimizer, loader = dpfix.make_private_safe(
        **call(module=habitual(), batch_size=20, max_physical_batch_size=4)
    )
    parts, released, last = [], [], []
    optimizer.attach_step_hook(lambda _: last.append(len(parts)))
    for batch in loader:
        optimizer.zero_grad()
        backward = sent(lambda batch=batch: step(model, batch).backward())
        before = len(last)
        parts.append((backward, sent(optimizer.step)))
        released.append(len(last) > before)
    own = DistributedDataParallel(network())
    ordinary = sent(lambda: step(own, digits(4)[:]).backward())
    return {"parts": parts, "released": released, "ordinary": ordinary, "tensors": len(list(own.parameters()))}


def by_habit(rank: int, size: int) -> dict[str, Any]:
    """Trainings of a model in torch's own wrapper."""
    found = {mode: train(call(module=habitual(), grad_sample_mode=mode), 3) for mode in ("vmap", "hooks")}
    found["memory manager"] = train(call(module=habitual(), batch_size=20), 3, managed=4)
    found["parts"] = train(call(module=habitual(), batch_size=20, max_physical_batch_size=4), 3)
    physical.free_memory = lambda device, ranks: 10**6 // (1 + rank)
    found["parts found"] = train(call(module=habitual(), batch_size=20, max_physical_batch_size="auto"), 3)
    found["noise"] = train(call(module=habitual(), noise_multiplier=2.0, seed=None), 6)
    found["without a wrapper"] = train(call(module=habitual(), wrap_model=False), 3)
    found["messages"] = messages()
    kept = habitual(gradient_as_bucket_view=True)
    found["the script's own object is called"] = train(call(module=kept), 3, called=kept)
    with kept.no_sync():
        found["kept"] = {"module": isinstance(kept.module, nn.Sequential), "ranks": "reducer" in vars(kept)}
    return found


def refused(act: Callable[[], Any]) -> str:
    """The class of error and the text of what fails."""
    try:
        act()
    except dpfix.DPFixError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """The mean of the losses of the samples, each with a weight."""
    return (nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[3]).mean()


LEFT_OUT = range(8)
"""Samples that are left out, one after the other."""


def leave_one_out(rank: int, size: int) -> dict[str, Any]:
    """The first step of one draw, with everybody and with one sample that counts for nothing."""
    found = {}
    for left_out in (-1, *LEFT_OUT):
        weight = torch.full((60,), 100.0)
        weight[left_out if left_out >= 0 else 60 :][:1] = 0.0
        loader = DataLoader(TensorDataset(*digits().tensors, weight), batch_size=20)
        given = call(module=habitual(), data_loader=loader, training_step=weighted, grad_sample_mode="vmap")
        found[str(left_out)] = train(given, 1)
    return found


def attempt(
    given: Callable[[], dict[str, Any]],
    make_private: Callable[..., Any] = dpfix.make_private_safe,
    averages: bool = False,
) -> dict[str, Any]:
    """What a call says that cannot work, and whether everything is as before.

    Args:
        averages: whether the model is in torch's wrapper, and has to go on averaging the gradients of the ranks.
    """
    arguments = given()
    model, before, state = arguments["module"], weights(arguments["module"]), torch.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    try:
        make_private(**arguments)
    except dpfix.DPFixError as error:
        kept = all(torch.equal(v, before[k]) for k, v in weights(model).items())
        kept = kept and [name for name, _ in model.named_modules()] == names
        if averages:
            model(torch.full((1, 1, 8, 8), float(distributed.get_rank()))).sum().backward()
            gradient = next(model.parameters()).grad
            kept = kept and type(model) is DistributedDataParallel and bool(gradient.eq(of_rank_0(gradient)).all())
        return {"error": type(error).__name__, "text": str(error), "kept": kept and state.equal(torch.get_rng_state())}
    return {"error": "", "text": "", "kept": False}


def of_rank_0(value: Tensor) -> Tensor:
    """The tensor that rank 0 has."""
    value = value.clone()
    distributed.broadcast(value, 0)
    return value


class OneRank(nn.Module):
    """A network that couples the samples of a batch on one rank only."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.net, self.coupled = network(), coupled

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        return x - x.mean(0) if self.coupled else x


def other_weights(rank: int) -> nn.Module:
    """A model that was changed on rank 1 after the weights were sent."""
    model = DPDDP(network())
    if rank == 1:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
    return model


class Scaled(nn.Module):
    """A network with a buffer that was made on every rank by itself."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("scale", torch.tensor(1.0 + rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale)


def optimized(groups: Callable[[nn.Module], Any], lr: float) -> dict[str, Any]:
    """A call with an optimizer of its own."""
    model = DPDDP(network())
    return call(module=model, optimizer=torch.optim.SGD(groups(model), lr=lr))


def picked(rank: int) -> DataLoader[Any]:
    """A loader that draws from other samples on every rank."""
    return DataLoader(digits(), batch_size=6, sampler=SubsetRandomSampler(range(rank, 40 + rank)))


def split(rank: int) -> DataLoader[Any]:
    """A loader over a part of the data that every rank has chosen by itself."""
    parts = random_split(digits(), [40, 20], generator=torch.Generator().manual_seed(rank))
    return DataLoader(parts[0], batch_size=6)


def shuffled(rank: int) -> DataLoader[Any]:
    """A loader over data in an order of its own on every rank."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(rank))
    return DataLoader(TensorDataset(*digits()[order]), batch_size=6)


def repeating(rank: int, size: int, samples: int = 61) -> DataLoader[Any]:
    """A loader whose sampler fills the last batch up with a sample that another rank has, if there is one too few."""
    sampler = DistributedSampler(digits(samples), num_replicas=size, rank=rank)
    return DataLoader(sampler.dataset, batch_size=6, sampler=sampler)


def refusals(rank: int, size: int) -> dict[str, Any]:
    """Calls that have to fail on every rank."""
    loader = DataLoader(digits(60 + rank), batch_size=6)
    sampler = DistributedSampler(digits(), num_replicas=size + 1, rank=rank)
    sampled = DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
    return {
        "torch's wrapper inside": attempt(lambda: call(module=nn.Sequential(DistributedDataParallel(network())))),
        "a group of its own": attempt(
            lambda: call(module=DistributedDataParallel(network(), process_group=distributed.new_group()))
        ),
        "coupled on rank 1 in torch's wrapper": attempt(
            lambda: call(module=habitual(OneRank(rank == 1))), averages=True
        ),
        "inside": attempt(lambda: call(module=nn.Sequential(DPDDP(network())))),
        "coupled on rank 1": attempt(lambda: call(module=DPDDP(OneRank(rank == 1)))),
        "wrong argument on rank 1": attempt(lambda: call(max_grad_norm=-1.0 if rank == 1 else 1.0)),
        "epsilon": attempt(
            lambda: (
                {k: v for k, v in call().items() if k != "noise_multiplier"}
                | {"target_epsilon": 3.0, "target_delta": 1e-3 if rank == 0 else 2.0, "epochs": 2}
            ),
            dpfix.make_private_safe_with_epsilon,
        ),
        "noise": attempt(lambda: call(noise_multiplier=1.0 + rank)),
        "buffers": attempt(lambda: call(module=DPDDP(Scaled(rank)))),
        "another learning rate": attempt(lambda: optimized(lambda model: [{"params": model.parameters()}], 0.1 + rank)),
        "another order of parameters": attempt(
            lambda: optimized(lambda m: [{"params": list(m.parameters())[:: -1 if rank else 1]}], 0.1)
        ),
        "other indices": attempt(lambda: call(data_loader=picked(rank))),
        "another split": attempt(lambda: call(data_loader=split(rank))),
        "other people": attempt(lambda: call(data_loader=shuffled(rank))),
        "other persons": attempt(lambda: call(privacy_unit=[OWNERS[rank], *OWNERS[1:]])),
        "persons on one rank": attempt(lambda: call(privacy_unit=OWNERS if rank else None)),
        "no persons on rank 1": attempt(lambda: call(privacy_unit=[None] * 60 if rank else OWNERS)),
        "own order": attempt(lambda: call(poisson_sampling=False)),
        "repeated samples": attempt(lambda: call(poisson_sampling=False, data_loader=repeating(rank, size))),
        "weights": attempt(lambda: call(module=other_weights(rank))),
        "samples": attempt(lambda: call(data_loader=loader)),
        "replicas": attempt(lambda: call(data_loader=sampled)),
        "seed": attempt(lambda: call(seed=None if rank else 0)),
        "clipping": attempt(lambda: call(clipping="adaptive", **ADAPTIVE)),
    }


class Gated(nn.Module):
    """A part whose result is cut out of the graph, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net, self.cuts = nn.Conv2d(1, 1, 3, padding=1), network(), True

    def forward(self, x: Tensor) -> Tensor:
        seen, other = self.first(x), self.first(x.flip(2))
        return self.net(seen + (other.detach() if self.cuts else other))


def loop(training: Any, batches: Iterable[Any]) -> None:
    """The training loop."""
    for batch in batches:
        training[1].zero_grad()
        step(training[0], batch).backward()
        training[1].step()


def misuse(given: dict[str, Any], act: Callable[[dpfix.PrivateTraining], None]) -> dict[str, Any]:
    """How a step ends that one rank does not make as the others do, and whether it was released."""
    training = dpfix.make_private_safe(**given)
    model = training[0] if given.get("wrap_model", True) else given["module"]
    before = [weights(model)]
    model.register_forward_pre_hook(lambda *_: before.append(weights(model)))
    try:
        act(training)
    except dpfix.DPFixError as error:
        kept = all(torch.equal(v, before[-1][k]) for k, v in weights(model).items())
        return {"error": type(error).__name__, "text": str(error), "kept": kept}
    return {"error": "", "text": "", "kept": False}


def misuses(rank: int, size: int) -> dict[str, Any]:
    """Ranks that do not make the same steps, and one case that is in order."""

    def region(training: dpfix.PrivateTraining) -> None:
        assert len(training.plan.no_grad_regions) == 1
        gated.cuts = False
        loop(training, training[2])

    def leave_out(training: dpfix.PrivateTraining) -> None:
        loop(training, (b for i, b in enumerate(training[2]) if (rank, i) != (1, 1)))

    def not_finite(training: dpfix.PrivateTraining) -> None:
        loop(training, ((b[0] * (math.inf if (rank, i) == (1, 1) else 1), *b[1:]) for i, b in enumerate(training[2])))

    def schedule(training: dpfix.PrivateTraining) -> None:
        loop(training, islice(training[2], 2))
        if rank == 0:
            ExponentialGradClip(training[1], gamma=0.5).step()
        loop(training, training[2])

    def load(training: dpfix.PrivateTraining) -> None:
        loop(training, islice(training[2], 2))
        file = io.BytesIO()
        given = {"path": file, "module": training[0], "optimizer": training[1], "data_loader": training[2]}
        training.privacy_engine.save_checkpoint(**given)
        loop(training, islice(training[2], 2))
        file.seek(0)
        if rank == 0:
            training.privacy_engine.load_checkpoint(**given)
        loop(training, training[2])

    def peek(training: dpfix.PrivateTraining) -> None:
        if rank == 0:
            next(iter(training[2]))
        loop(training, training[2])

    def wrap(training: dpfix.PrivateTraining) -> None:
        wrapped = DistributedDataParallel(training[0])
        loop((wrapped, *tuple(training)[1:]), training[2])

    def wrap_inside(training: dpfix.PrivateTraining) -> None:
        loop((DistributedDataParallel(plain), *tuple(training)[1:]), training[2])

    def noise_of(number: int) -> Callable[[dpfix.PrivateTraining], None]:
        """All ranks add noise as that rank does."""

        def act(training: dpfix.PrivateTraining) -> None:
            training[1].rank = number
            loop(training, training[2])

        return act

    gated, plain = Gated(), network(0)
    found = {
        "wrapped afterwards": misuse(call(module=network(0), grad_sample_mode="bookkeeping"), wrap),
        "wrapped afterwards, hooks": misuse(
            call(module=plain, grad_sample_mode="hooks", wrap_model=False), wrap_inside
        ),
        "region": misuse(call(module=DPDDP(gated)), region),
        "left out": misuse(call(batch_size=20), leave_out),
        "not finite": misuse(call(batch_size=20), not_finite),
        "scheduler": misuse(call(), schedule),
        "load": misuse(call(poisson_sampling=False, data_loader=repeating(rank, size, 60)), load),
        "peek": misuse(call(), peek),
        "noise on every rank": misuse(call(noise_multiplier=1.0), noise_of(0)),
        "noise on no rank": misuse(call(noise_multiplier=1.0), noise_of(1)),
    }
    training = dpfix.make_private_safe(**call())
    for _ in islice(training[2], 1 + rank):
        pass
    seen: list[list[int]] = []

    def watched() -> Iterator[Any]:
        for batch in training[2]:
            seen.append(batch[2].tolist() if training[2].ledger.pending() else [])
            yield batch

    loop(training, watched())
    return found | {"left early": {"draws": seen, "weights": weights(training[0])}}


def budgets(rank: int, size: int) -> dict[str, Any]:
    """A training that goes on until its budget is spent."""
    file = Path(sys.argv[2]) / "data.budget.json"
    if rank == 0:
        dpfix.Budget(file, epsilon=4.0, delta=1e-3)
    distributed.barrier()
    training = dpfix.make_private_safe(**call(noise_multiplier=1.0, budget=dpfix.Budget(file)))
    steps, before, stopped = 0, weights(training[0]), ""
    while not stopped:
        for batch in training[2]:
            before = weights(training[0])
            training[1].zero_grad()
            step(training[0], batch).backward()
            try:
                training[1].step()
            except dpfix.DPFixError as error:
                stopped = type(error).__name__
                break
            steps += 1
    after = weights(training[0])
    training[0].cleanup()
    return {"steps": steps, "refused": stopped, "before": before, "after": after, "spent": dpfix.Budget(file).spent()}


def death(rank: int, size: int) -> dict[str, Any]:
    """Rank 1 ends in the middle of the training."""
    training = dpfix.make_private_safe(**call(module=habitual(), batch_size=20))
    model, _, loader = training
    loop(training, islice(loader, 1))
    if rank == 1:
        os._exit(0)  # torchrun would end the others at once if it were told of a failure
    before, began = weights(model), time.monotonic()
    try:
        loop(training, loader)
    except dpfix.DPFixError as error:
        kept = all(torch.equal(v, before[k]) for k, v in weights(model).items())
        told = {"error": type(error).__name__, "text": str(error), "kept": kept, "took": time.monotonic() - began}
        torch.save(told, Path(sys.argv[2]) / f"{rank}.pt")
    os._exit(0)


def checkpoint(rank: int, size: int) -> dict[str, Any]:
    """Go on from the checkpoint of the folder, if there is one; after three steps, one is saved."""
    training = dpfix.make_private_safe(**call(module=habitual(), batch_size=20))
    model, optimizer, loader = training
    file = Path(sys.argv[2]) / "checkpoint.pt"
    objects = {"path": file, "module": model, "optimizer": optimizer, "data_loader": loader}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if goes_on := file.exists():
            training.privacy_engine.load_checkpoint(**objects)
    states, draws = [weights(model)], list[list[int]]()
    while len(draws) < 3:
        for batch in loader:
            optimizer.zero_grad()
            step(model, batch).backward()
            draws.append(batch[2].tolist() if loader.ledger.pending() else [])
            optimizer.step()
            states.append(weights(model))
            if len(draws) == 3 and (goes_on or len(states) == 4):
                break
    distributed.barrier()
    if rank == 0 and not goes_on:
        training.privacy_engine.save_checkpoint(**objects)
    distributed.barrier()
    history = training.privacy_engine.accountant.history
    return {"run": {"states": states, "draws": draws}, "history": history, "told": [str(w.message) for w in told]}


def with_accelerate(rank: int, size: int) -> dict[str, Any]:
    """A model that accelerate has prepared before the call, and one that it prepares afterwards."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), network(0)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    found = {"before": train(call(module=prepared, optimizer=optimizer, grad_sample_mode="bookkeeping"), 3)}

    def afterwards(training: dpfix.PrivateTraining) -> None:
        loop((accelerator.prepare(training[0]), training[1], training[2]), training[2])

    return found | {"afterwards": misuse(call(module=network(0), grad_sample_mode="bookkeeping"), afterwards)}


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "trainings": trainings,
    "by habit": by_habit,
    "leave one out": leave_one_out,
    "refusals": refusals,
    "misuses": misuses,
    "budgets": budgets,
    "death": death,
    "checkpoint": checkpoint,
    "accelerate": with_accelerate,
}


Scenarios = Mapping[str, Callable[[int, int], dict[str, Any]]]


def main(scenarios: Scenarios) -> None:
    """Run a scenario on this rank."""
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same on every rank, as most scripts do
    warnings.simplefilter("ignore")
    found = scenarios[scenario](rank, size)
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(SCENARIOS)
