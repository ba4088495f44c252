"""What private training costs on 1 to 1024 accelerators, computed, and how well the formulas fit what can be measured here.

``python -m benchmarks.scaling_model [--write docs/scaling.md]``

The formulas of a layer are those of :mod:`benchmarks.common.cost`; ``tests/test_scaling.py`` holds them against torch's counts.
Memory that autograd keeps is measured on models of the same proportions, a sixteenth as wide. What is computed for accelerators
takes the numbers of a data sheet, and shares of them that are reached.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn

from benchmarks.common import cost, tables
from benchmarks.common.cost import FLOAT, HALF, LLAMAS, Cost, Llama
from benchmarks.common.process import cpu_seconds, in_a_fresh_process, peak_bytes, products, quiet
from benchmarks.ranks_cost import KINDS, call
from dpfix.engines.saved_bytes import saved_bytes
from dpfix.sampling.randomness import Stream
from dpfix.training.normal_noise import add_normal

# ------------------------------------------------------------------ an accelerator: NVIDIA H100 SXM, in nodes of eight

HALF_PEAK, FLOAT_PEAK = 989.4e12, 66.9e12
"""Operations a second in bfloat16 (dense), and in float32 without TF32. "NVIDIA H100 Tensor Core GPU Architecture", table 2."""
MEMORY, MEMORY_SPEED = 80e9, 3.35e12
"""Bytes, and bytes a second. NVIDIA H100 data sheet."""
NODE, LINK, NETWORK = 8, 450e9, 8 * 50e9
"""Accelerators of a node; bytes a second of one to the others (NVLink, 900 GB/s both ways; NVIDIA H100 data sheet), and of a
node to others, whose eight ports of 400 Gb/s a ring uses together (NVIDIA DGX H100 user guide)."""
HALF_REACHED = 0.40
"""Share of the peak that trainings reach in bfloat16: 38 to 43 % in "The Llama 3 Herd of Models" (arXiv 2407.21783, table 4)."""
FLOAT_REACHED, SPEED_REACHED = 0.8, 0.8
"""Shares of the peaks of large products in float32, of memory and of links. Assumed."""
LATENCY = 10e-6
"""Seconds of a message, times the logarithm to base 2 of the accelerators. Assumed."""
USED = 0.9
"""Share of the memory that tensors may take. Assumed."""
STATE = 4 * FLOAT + HALF
"""Bytes for a trained number: weight, clipped sum or gradient, two states of Adam, and the copy that autocast makes."""

ACCELERATORS = (1, 8, 64, 1024)
TOKENS, BATCH, RANK = 512, 2048, 16
"""Tokens of a sample, samples of a logical batch, rank of adapters."""
SHRINK = 16
SAMPLES = 10_000_000
"""Of the data set whose draws and accounting are looked at."""

# ------------------------------------------------------------------ measured


def shrunk(model: Llama, layers: int) -> nn.Module:
    """A model of the same proportions, a sixteenth as wide."""
    import transformers

    width = model.width // SHRINK
    config = transformers.LlamaConfig(
        vocab_size=model.words // SHRINK, num_hidden_layers=layers, hidden_size=width,
        intermediate_size=model.hidden // SHRINK, num_attention_heads=width // 16,
        num_key_value_heads=model.keys // SHRINK // 16, use_cache=False,
    )  # fmt: skip
    made: Any = transformers.LlamaForCausalLM(config)
    if model.rank:
        import peft

        made = peft.get_peft_model(made, peft.LoraConfig(r=model.rank // SHRINK, target_modules="all-linear"))
    return made.train()


def next_word(model: nn.Module, batch: Any, kind: torch.dtype = torch.float32) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
        logits = model(input_ids=batch[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


@cache
def saved(model: Llama) -> float:
    """Bytes that autograd keeps of a token under autocast, measured on the narrow model."""

    def kept(layers: int, positions: int) -> int:
        made, ids = shrunk(model, layers), torch.zeros(1, positions, dtype=torch.long)
        with saved_bytes(made.parameters()) as seen:
            next_word(made, (ids, ids), torch.bfloat16)
        return sum(seen.values())

    one, two = ((kept(layers, 256) - kept(layers, 128)) / 128 for layers in (1, 2))  # without copies of weights
    return SHRINK * (one + (model.layers - 1) * (two - one))


def predicted(model: Llama, layers: int, positions: int) -> Cost:
    """The cost of the narrow model, without attention, which torch does not count on the CPU."""
    narrow = replace(
        model, layers=layers, width=model.width // SHRINK, hidden=model.hidden // SHRINK, keys=model.keys // SHRINK,
        words=model.words // SHRINK,
    )  # fmt: skip
    return narrow.cost(positions) + cost.attention(positions, narrow.width) * -layers


def stepped(
    kind: torch.dtype, size: int, positions: int, names: Sequence[str] = KINDS
) -> dict[str, Callable[[], None]]:
    """Steps of the narrow model of 7 billion."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        model: Any = shrunk(LLAMAS[2], 4)
        data = tuple(torch.randint(0, LLAMAS[2].words // SHRINK, (size, positions)) for _ in range(2))
        step = partial(next_word, kind=kind)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
        if name == "private":
            model, optimizer, _ = call(model, data, step)
        found[name] = partial(one_step, model, optimizer, data, step)
        for _ in range(2):
            found[name]()
        if name == "private":
            optimizer.guard.real_steps.agenda.due = lambda seen: False
    return found


def peak_alone(name: str, size: int, positions: int) -> int:
    """Bytes of one of the two steps, in a process that holds nothing of the other."""
    quiet()
    return peak_bytes(stepped(torch.bfloat16, size, positions, (name,))[name])


def one_step(model: nn.Module, optimizer: Any, data: Any, step: Callable[..., Tensor]) -> None:
    optimizer.zero_grad()
    step(model, data).backward()
    optimizer.step()


def measurements() -> Iterator[str]:
    """What the formulas say, beside what is measured."""
    size, positions = 4, 128
    steps, whole = stepped(torch.float32, size, positions), predicted(LLAMAS[2], 4, positions) * size
    for name, wanted in (("ordinary", whole.ordinary), ("private", whole.bookkeeping)):
        (counted,) = products(steps[name]).values()
        yield tables.row(f"operations, {name} step", f"{counted / 1e9:.3f} G", f"{wanted / 1e9:.3f} G")
    times = {name: statistics.median(cpu_seconds(step) for _ in range(7)) for name, step in steps.items()}
    yield tables.row(
        "private step / ordinary step, CPU time and operations", f"{times['private'] / times['ordinary']:.2f}",
        f"{whole.bookkeeping / whole.ordinary:.2f}",
    )  # fmt: skip
    steps = stepped(torch.bfloat16, size, positions)
    counted = products(steps["private"])
    yield tables.row(
        "of a private step under bfloat16: operations in float32",
        f"{counted[torch.float32] / sum(counted.values()):.1%}", f"{(whole.norms + whole.sums) / whole.bookkeeping:.1%}",
    )  # fmt: skip
    numbers = sum(p.numel() for p in shrunk(LLAMAS[2], 4).parameters())
    weights, copies = FLOAT * numbers, HALF * numbers
    activations = saved(replace(LLAMAS[2], layers=4)) / SHRINK * positions * size
    for name, wanted in (("ordinary", copies + activations), ("private", max(copies + activations, whole.held))):
        peak = in_a_fresh_process(peak_alone, name, size, positions)
        yield tables.row(
            f"peak of the {name} step under bfloat16 (SGD)",
            f"{peak / 1e6:.1f} MB",
            f"{(weights + wanted) / 1e6:.1f} MB",
        )


@cache
def on_the_cpu() -> dict[str, float]:
    """Nanoseconds of a number of noise and of a sample that may be drawn, seconds of an epsilon."""
    total, stream = torch.zeros(4_000_000), Stream((1,))
    noise = statistics.median(cpu_seconds(lambda: add_normal([total], 1.0, stream)) for _ in range(5))
    draws = statistics.median(cpu_seconds(lambda: stream.uniform(4_000_000) < 1e-4) for _ in range(5))
    accountant = PRVAccountant()
    accountant.history = [(0.8, BATCH / SAMPLES, SAMPLES // BATCH)]
    start = time.process_time()
    accountant.get_epsilon(delta=1e-8)
    return {"noise": noise / 4e-3, "draws": draws / 4e-3, "epsilon": time.process_time() - start}


# ------------------------------------------------------------------ computed


@dataclass(frozen=True)
class Step:
    """A step of a model on some accelerators.

    Attributes:
        model: the model.
        accelerators: how many there are.
        private: whether book-keeping makes it.
        sharded: whether every accelerator holds a part of the states only.
    """

    model: Llama
    accelerators: int
    private: bool
    sharded: bool = False

    @property
    def states(self) -> float:
        """Bytes of an accelerator without any sample; frozen numbers are in bfloat16."""
        model = self.model
        frozen = HALF * model.numbers if model.rank else 0
        whole = frozen + STATE * model.trained
        block = model.numbers / model.layers * (FLOAT + HALF)  # one block is whole at a time
        return whole / self.accelerators + block if self.sharded and self.accelerators > 1 else whole

    @property
    def of_sample(self) -> float:
        """Bytes of a sample."""
        kept = saved(self.model) * TOKENS
        return max(kept, self.model.cost(TOKENS).held) if self.private else kept

    @property
    def fitting(self) -> int:
        """Samples that fit into an accelerator."""
        return max(0, int((USED * MEMORY - self.states) // self.of_sample))

    @property
    def samples(self) -> float:
        """Samples of an accelerator in a logical batch."""
        return BATCH / self.accelerators

    @property
    def parts(self) -> int:
        """Physical batches of an accelerator."""
        return math.ceil(self.samples / self.fitting)

    @property
    def computed(self) -> float:
        """Seconds of the products, and of what book-keeping reads and writes for them."""
        one, half = self.model.cost(TOKENS), HALF_PEAK * HALF_REACHED
        if not self.private:
            return self.samples * one.ordinary / half
        in_float = (one.norms + one.sums) / (FLOAT_PEAK * FLOAT_REACHED)
        return self.samples * ((one.forward + one.inputs) / half + in_float + one.read / (MEMORY_SPEED * SPEED_REACHED))

    @property
    def sent(self) -> float:
        """Seconds in which sums, or gradients, are sent and nothing else happens."""
        model, messages = self.model, self.model.tensors + 2
        if not self.private:
            messages = math.ceil(FLOAT * model.trained / 25e6)  # the buckets of torch's wrapper
        seconds = around(self.accelerators, FLOAT * model.trained * (1 if self.sharded else 2), messages)
        if not self.private:
            seconds = max(0.0, seconds - self.computed * 2 / 3 / self.parts)  # sent while the last backward pass runs
        weights = (
            2 * self.parts * around(self.accelerators, HALF * model.numbers, 2 * model.layers) if self.sharded else 0
        )
        return seconds + max(0.0, weights - self.computed)

    @property
    def noised(self) -> float:
        """Seconds of the noise: written, read with the sum, and written again, on one accelerator or on its shard."""
        numbers = self.model.trained / (self.accelerators if self.sharded else 1)
        return 4 * FLOAT * numbers / (MEMORY_SPEED * SPEED_REACHED) if self.private else 0.0

    @property
    def seconds(self) -> float:
        return self.computed + self.sent + self.noised


def around(accelerators: int, count: float, messages: int) -> float:
    """Seconds in which so many bytes go around a ring."""
    if accelerators == 1:
        return 0.0
    speed = (LINK if accelerators <= NODE else NETWORK) * SPEED_REACHED
    return (accelerators - 1) / accelerators * count / speed + messages * LATENCY * math.log2(accelerators)


def models() -> list[Llama]:
    """Every model, all trained and with adapters."""
    return [m for model in LLAMAS for m in (model, replace(model, name=f"{model.name}, LoRA", rank=RANK))]


LAYERS: dict[str, Callable[[int], Cost]] = {
    "Linear 4096 -> 4096": lambda t: cost.product(t, 4096, 4096),
    "Linear 4096 -> 11008": lambda t: cost.product(t, 4096, 11_008),
    "Linear 4096 -> 32000 (head)": lambda t: cost.product(t, 4096, 32_000),
    "Linear 4096 -> 4096, frozen": lambda t: cost.product(t, 4096, 4096, trained=False),
    "its adapters, rank 16": lambda t: cost.product(t, 4096, 16) + cost.product(t, 16, 4096),
    "Embedding 32000 x 4096": lambda t: cost.lookup(t, 32_000, 4096),
    "RMSNorm 4096": lambda t: cost.scale(t, 4096),
    "attention, 4096": lambda t: cost.attention(t, 4096),
}
MESSAGES = {"Linear 4096 -> 4096, frozen": 0, "its adapters, rank 16": 2, "attention, 4096": 0}


def kinds() -> Iterator[str]:
    yield from tables.head(
        "layer", "ordinary, GFLOP", "book-keeping", "held until the clip, MB", "per-sample gradient, MB", "moved, MB", "messages",
    )  # fmt: skip
    for name, of in LAYERS.items():
        one = of(TOKENS)
        yield tables.row(
            name, f"{one.ordinary / 1e9:.2f}", f"{one.bookkeeping / 1e9:.2f}",
            *(f"{count / 1e6:.2f}" for count in (one.held, one.single, one.read)), MESSAGES.get(name, 1),
        )  # fmt: skip


def ways() -> Iterator[str]:
    lengths = (32, 128, 512, 1024, 2048, 4096, 8192)
    yield from tables.head("width", *(f"{length} tokens" for length in lengths))
    for width in (768, 2048, 4096, 8192):
        cells = []
        for length in lengths:
            one = cost.product(length, width, width)
            cells.append(
                f"{one.bookkeeping / one.ordinary:.2f} {cost.way(length, width, width)}, {one.held / 1e6:.0f} MB"
            )
        yield tables.row(width, *cells)


def memory() -> Iterator[str]:
    yield from tables.head(
        "model", "trained numbers", "messages", "states, GB", "a sample, ordinary, GB", "private", "of it held in float32",
        "samples that fit, ordinary", "private",
    )  # fmt: skip
    for model in models():
        ordinary, private = (Step(model, 1, private) for private in (False, True))
        yield tables.row(
            model.name, f"{model.trained:,}", model.tensors, f"{ordinary.states / 1e9:.1f}",
            f"{ordinary.of_sample / 1e9:.2f}", f"{private.of_sample / 1e9:.2f}",
            f"{model.cost(TOKENS).held / 1e9:.2f}", ordinary.fitting or "none", private.fitting or "none",
        )  # fmt: skip


def seconds() -> Iterator[str]:
    yield from tables.head(
        "model",
        "accelerators",
        "states",
        "ordinary step",
        "private step",
        "times",
        "with float32 everywhere",
        "sums sent",
        "noise",
    )
    for model in models():
        one = model.cost(TOKENS)
        for accelerators in ACCELERATORS:
            made = [
                Step(model, accelerators, private, sharded) for sharded in (False, True) for private in (False, True)
            ]
            ordinary, private = made[:2] if made[1].fitting else made[2:]
            if not private.fitting:
                yield tables.row(model.name, accelerators, "do not fit", *[""] * 6)
                continue
            yield tables.row(
                model.name, accelerators, "sharded" if private.sharded else "whole", duration(ordinary.seconds),
                duration(private.seconds), f"{private.seconds / ordinary.seconds:.2f}", f"{one.bookkeeping / one.ordinary:.2f}",
                duration(private.sent), duration(private.noised),
            )  # fmt: skip


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"


def batches() -> Iterator[str]:
    yield from tables.head(
        "logical batch", "steps of a pass", "noise multiplier", "noise of the mean, in clip norms", "drawing for a pass",
    )  # fmt: skip
    for size in (512, 2048, 8192, 32_768, 131_072):
        steps = math.ceil(SAMPLES / size)
        noise = get_noise_multiplier(
            target_epsilon=8.0, target_delta=1e-8, sample_rate=size / SAMPLES, steps=steps, accountant="rdp"
        )
        drawing = steps * SAMPLES * on_the_cpu()["draws"] / 1e9
        yield tables.row(f"{size:,}", f"{steps:,}", f"{noise:.2f}", f"{noise / size:.1e}", f"{drawing:,.0f} s")


def page() -> Iterator[str]:
    """Everything that the script writes."""
    cpu = on_the_cpu()
    yield "### Measured, beside the formulas\n"
    yield "A model with the proportions of 7 B, a sixteenth as wide, 4 layers, 4 samples of 128 tokens, one thread of a CPU.\n"
    yield from [*tables.head("", "measured", "formula"), *measurements()]
    yield f"\nOn one core: noise {cpu['noise']:.1f} ns a number; a draw {cpu['draws']:.1f} ns for every sample of the data set;"
    yield f"an epsilon of the PRV accountant {cpu['epsilon']:.1f} s. torch {torch.__version__}."
    yield f"\n### Computed: layer by layer\n\nOne sample of {TOKENS} tokens, float32.\n"
    yield from kinds()
    yield "\n### Computed: Gram matrices or kept gradients\n"
    yield "A square `Linear`: operations of book-keeping by those of an ordinary step, the way, and what one sample holds.\n"
    yield from ways()
    yield "\n### Computed: memory of an accelerator\n"
    yield f"bfloat16 by autocast, {TOKENS} tokens a sample, Adam, nothing sharded, 80 GB.\n"
    yield from memory()
    yield f"\n### Computed: seconds of a step\n\nA logical batch of {BATCH} samples of {TOKENS} tokens, bfloat16 by autocast.\n"
    yield from seconds()
    yield f"\n### Computed: size of the batch\n\n{SAMPLES:,} samples, one pass, epsilon 8 at delta 1e-8 (RDP).\n"
    yield from batches()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    given = parser.parse_args()
    quiet()
    lines: Sequence[str] = list(page())
    print("\n".join(lines))
    if given.write:
        tables.write(given.write, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
