"""What every rank runs in the tests of training on several processes; started by torchrun from ``test_ranks.py``.

``torchrun --nproc-per-node N -m tests.on_ranks SCENARIO FOLDER`` writes what rank r saw to ``FOLDER/r.pt``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dpfix

CLIP, RATE = 0.5, 0.5


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
    }
    return given | changes


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by their names in the network."""
    return {k.removeprefix("_module.").removeprefix("module."): v.clone() for k, v in model.state_dict().items()}


def train(given: dict[str, Any], steps: int, physical: int = 0) -> dict[str, Any]:
    """Some steps: what was drawn here, the weights before and after each, and what was accounted."""
    training = dpfix.make_private_safe(**given)
    model, optimizer, loader = training
    states, draws, drawn = [weights(model)], [], []

    def released(_: Any) -> None:
        draws.append(drawn.copy())
        drawn.clear()

    optimizer.attach_step_hook(released)
    batches: Any = loader
    if physical:
        manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer)
        batches = manager.__enter__()
    while len(draws) < steps:
        for batch in batches:
            optimizer.zero_grad()
            step(model, batch).backward()
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
        "history": training.privacy_engine.accountant.history,
        "epsilon": training.get_epsilon(1e-3),
        "report": str(training.report),
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
    found["memory manager"] = train(call(batch_size=20), 3, physical=4)
    found["sum"] = train(
        call(loss_reduction="sum", training_step=lambda m, b: step(m, b) * len(b[0]), grad_sample_mode="auto"), 3
    )
    found["noise"] = train(call(noise_multiplier=2.0), 6)
    sampler = DistributedSampler(digits(), seed=1)
    loader = DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
    found["distributed sampler"] = train(call(data_loader=loader), 3)
    return found


def attempt(given: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call says that cannot work, and whether everything is as before."""
    arguments = given()
    model, before, state = arguments["module"], weights(arguments["module"]), torch.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    try:
        dpfix.make_private_safe(**arguments)
    except dpfix.DPFixError as error:
        kept = all(torch.equal(v, before[k]) for k, v in weights(model).items())
        kept = kept and [name for name, _ in model.named_modules()] == names
        return {"error": type(error).__name__, "text": str(error), "kept": kept and state.equal(torch.get_rng_state())}
    return {"error": "", "text": "", "kept": False}


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


def refusals(rank: int, size: int) -> dict[str, Any]:
    """Calls that have to fail on every rank."""
    loader = DataLoader(digits(60 + rank), batch_size=6)
    sampler = DistributedSampler(digits(), num_replicas=size + 1, rank=rank)
    sampled = DataLoader(sampler.dataset, batch_size=4, sampler=sampler)
    return {
        "torch's wrapper": attempt(lambda: call(module=DistributedDataParallel(network()))),
        "inside": attempt(lambda: call(module=nn.Sequential(DPDDP(network())))),
        "coupled on rank 1": attempt(lambda: call(module=DPDDP(OneRank(rank == 1)))),
        "wrong argument on rank 1": attempt(lambda: call(max_grad_norm=-1.0 if rank == 1 else 1.0)),
        "noise": attempt(lambda: call(noise_multiplier=1.0 + rank)),
        "weights": attempt(lambda: call(module=other_weights(rank))),
        "samples": attempt(lambda: call(data_loader=loader)),
        "replicas": attempt(lambda: call(data_loader=sampled)),
        "clipping": attempt(lambda: call(clipping="adaptive", target_unclipped_quantile=0.5)),
    }


class Gated(nn.Module):
    """A part whose result is cut out of the graph, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net, self.cuts = nn.Conv2d(1, 1, 3, padding=1), network(), True

    def forward(self, x: Tensor) -> Tensor:
        seen, other = self.first(x), self.first(x.flip(2))
        return self.net(seen + (other.detach() if self.cuts else other))


def tripped(rank: int, size: int) -> dict[str, Any]:
    """Gradient reaches a no-grad region on all ranks: nobody may leave the step out alone."""
    model = Gated()
    training = dpfix.make_private_safe(**call(module=DPDDP(model)))
    regions = len(training.plan.no_grad_regions)
    model.cuts = False
    batch = next(iter(training[2]))
    training[1].zero_grad()
    step(training[0], batch).backward()
    try:
        training[1].step()
    except dpfix.PlanBrokenError as error:
        return {"regions": regions, "text": str(error)}
    return {"regions": regions, "text": ""}


def main() -> None:
    """Run a scenario on this rank."""
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same on every rank, as most scripts do
    warnings.simplefilter("ignore")
    found = {"trainings": trainings, "refusals": refusals, "tripped": tripped}[scenario](rank, size)
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
