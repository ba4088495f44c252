"""The noise that leaves the optimizer is the noise that is accounted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.errors import NoiseError
from dpfix.instrument.sharded import local
from dpfix.report.finding import Finding
from dpfix.training.adaptive_clipping import noise_of_sums
from dpfix.training.guards.check import Check, Guarded
from dpfix.training.noise_evidence import PRINT, Repeats, Seen, SizeEvidence

LOOKED_AT = 4096
"""Numbers that a step looks at, shared out among the parameters; 16 of each if that is more."""

AHEAD = 64
"""Steps whose places are drawn at once."""

TOGETHER = 8
"""Steps that are judged one after another in the last of them, after the first steps of a training."""

AT_ONCE = 16
"""First steps of a training, which are judged at once."""

FEW = 4096
"""Where a parameter has fewer than 8 numbers, the part of their likely sum of squares below which noise may be missing."""

STANDS_OUT = 5.0
"""Standard deviations by which sums of squares may be too large or too small without standing out."""

LARGEST_SUM = 2.0**10
"""Multiple of the noise's standard deviation: where the clipped sum is larger, rounding could disturb the test."""

SIZES = (2.0**-100, 2.0**100)
"""Standard deviations, before and after scaling, that float32 shows precisely."""

ROUNDING = 2.0**-20
"""Part of a sum that rounding may change while it is scaled."""


class ProvenNoise(Check):
    """Every release holds fresh noise of the standard deviation that is accounted, on every parameter.

    Some numbers of every parameter, the first ones and as many at a place that is drawn anew in every step, are read in the
    clipped sum, and once more when noise and scaling are done: before the accountant counts, before the script's step hook,
    which may change ``p.grad``, and before any parameter moves. What has come in between, in units of the standard deviation
    ``noise_multiplier * max_grad_norm`` (the largest clip norm of the logical batch), is evidence for
    :class:`~dpfix.training.noise_evidence.SizeEvidence` and :class:`~dpfix.training.noise_evidence.Repeats`. Together they
    refuse right noise with probability 1e-9 in a training, however long it is. On several ranks, rank 0 adds the noise; that
    the others add none is checked exactly. Where parameters are spread over the ranks, each looks at the noise on its own parts.

    The first 8 numbers of every parameter are looked at in every step, for repeats and for noise that is missing or of
    another size. All numbers of a step are judged at once in the first 16 steps, and where those first numbers stand out;
    otherwise in every eighth step for the last eight, one after another, so that what only they show is found up to 7 steps late.

    Catches: noise that is missing on one parameter (in its first step, if it has 6 numbers), scaled by the batch size, added
    twice (in the first step of a model with 400 numbers), 5 % too small or too large (in 4 steps of a model with 4096
    numbers, in inverse proportion for smaller ones), drawn again from a seed that was used, or shared by two parameters (in the
    step in which it happens). Nothing is looked at in a step without noise, and no number whose clipped sum is more than 1024
    standard deviations large. Costs: two small copies per parameter; about 0.2 ms for a small model, and 6 us more for every
    further parameter.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        parameters = {name: part for name, p in guarded.parameters.items() if (part := local(p)).numel()}
        self.needed = bool(parameters)
        if self.needed:
            self._numbers = Numbers(parameters)
            self._names = self._numbers.names
            self._parameters = [guarded.parameters[name] for name in self._names]
            self._size = SizeEvidence(len(self._parameters))
            self._repeats = Repeats(self._numbers.counts.tolist())
        self._summed, self._clip_norm = False, 0.0
        self._wrong_size: Finding | None = None

    @override
    def take_over(self, earlier: ProvenNoise) -> None:
        self._clip_norm, self._wrong_size = earlier._clip_norm, earlier._wrong_size
        if self.needed and earlier.needed and self._names == earlier._names:
            self._numbers, self._size, self._repeats = earlier._numbers, earlier._size, earlier._repeats

    def went_back(self) -> None:
        """The script goes on from a checkpoint: with a seed, noise may come again."""
        if self.needed:
            self._repeats.forget()

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        norm = float(optimizer.max_grad_norm)
        self._clip_norm = max(norm, self._clip_norm) if self._guarded.progress.partial else norm

    @override
    def summed(self, norms: torch.Tensor | None) -> None:
        sums = [p.summed_grad for p in self._parameters]  # type: ignore[attr-defined]
        self._summed = False
        if self._numbers.waiting == TOGETHER:  # the step that should have judged them was interrupted
            self._judge()
        if all(total is not None for total in sums):
            self._numbers.move()
            self._numbers.copy(sums, after=False)
            self._summed = True

    @override
    def noised(self, optimizer: DPOptimizer) -> None:
        summed, self._summed = self._summed, False
        std = noise_of_sums(optimizer) * self._clip_norm
        if not summed or std == 0:
            return
        gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
        if len(gradients) < len(self._parameters):
            part = next(i for i, p in enumerate(self._parameters) if p.grad is None)
            self._refuse_size(part, "not known, because p.grad is None,")
        scale = 1.0
        if optimizer.loss_reduction == "mean":
            scale = float(optimizer.expected_batch_size) * optimizer.accumulated_iterations  # type: ignore[arg-type]
        self._numbers.copy(gradients, after=True)
        if self._guarded.ranks.rank and self._guarded.shards is None:
            before, after = self._numbers.values()
            self._check_none(after * scale - before, before)
        elif std >= SIZES[0] * max(1.0, scale) and std <= SIZES[1] * min(1.0, scale):
            self._check(1 / std, scale / std)

    def _check_none(self, added: NDArray[np.float64], sums: NDArray[np.float64]) -> None:
        """Noise is that of rank 0 alone."""
        more = np.abs(added) > ROUNDING * np.abs(sums) + SIZES[0]
        if more.any():
            self._refuse_size(self._numbers.part_of(int(np.argmax(more))), "not zero, although rank 0 alone adds noise")

    def _check(self, of_sum: float, of_result: float) -> None:
        """Look at the noise of a step.

        Args:
            of_sum: what the numbers of the clipped sum have to be multiplied by to be in units of the standard deviation.
            of_result: the same for what the optimizer has made of it.
        """
        if self._wrong_size is not None:
            self._refuse(self._wrong_size)
        noise = [
            after * of_result - before * of_sum if abs(before * of_sum) <= LARGEST_SUM else math.nan
            for before, after in zip(*self._numbers.first_ones(), strict=True)
        ]
        self._numbers.keep(of_sum, of_result)
        if self._numbers.waiting == TOGETHER or self._size.steps < AT_ONCE or self._stand_out(noise):
            self._judge()
        repeated = self._repeats.add(noise, self._guarded.progress.released + 1)
        if repeated is not None:
            self._refuse_repeat(*repeated)

    def _stand_out(self, noise: Sequence[float]) -> bool:
        """Whether the first numbers of a parameter, or all of them together, have an unlikely size."""
        squares = [x * x for x in noise]
        for start, end, least, most in self._numbers.likely:
            if not least <= sum(squares[start:end]) <= most:
                return True  # for a NaN, too
        return not abs(sum(squares) - len(squares)) <= STANDS_OUT * math.sqrt(2 * len(squares))

    def _judge(self) -> None:
        """All numbers of the steps that have not been judged yet, one step after another."""
        kept = self._numbers.take()
        sums = kept[:, 0]
        noise = kept[:, 1] - sums
        known = np.abs(sums) <= LARGEST_SUM
        noise[~known] = 0.0
        counts, squares = (
            np.add.reduceat(of, self._numbers.starts, 1) for of in (known.astype(np.int64), np.square(noise))
        )
        for of_step in zip(counts, squares, strict=True):
            wrong = self._size.add(*of_step)
            if wrong is not None:
                part, ratio = wrong
                size = "missing, or less than 1 % of" if ratio < 0.01 else f"about {ratio:g} times"
                self._refuse_size(part, f"{size} noise_multiplier * max_grad_norm")

    def _refuse_size(self, part: int, what: str) -> NoReturn:
        path = self._names[part] if part < len(self._names) else ""
        steps = self._size.steps
        where = f"parameter `{path}`" if path else "all parameters together"
        self._wrong_size = Finding.refusal(
            "DPF035",
            f"the standard deviation of the noise on {where} of {self._guarded.name} is {what} (release {steps}).",
            "What left the optimizer is not the clipped sum with the noise that the accountant counts, so the guarantee does not "
            "hold. This step is not released; the steps before may have been made with such noise.",
            "Look for code that replaces or wraps the optimizer's add_noise or scale_grad, writes to p.summed_grad or p.grad "
            "in between, or patches torch.normal. Change noise in optimizer.noise_multiplier, and p.grad in a hook of "
            "attach_step_hook. Then train anew.",
            path=path or "optimizer",
        )
        self._refuse(self._wrong_size)

    def _refuse_repeat(self, here: Seen, before: Seen) -> NoReturn:
        (step, part), (earlier, of) = here, before
        path = self._names[part]
        where = "" if of == part else f" on parameter `{self._names[of]}`"
        when = "the same release" if step == earlier else f"release {earlier}"
        self._refuse(
            Finding.refusal(
                "DPF036",
                f"the noise on parameter `{path}` of {self._guarded.name} in release {step} is that of {when}{where}.",
                "The difference of two releases with the same noise has no noise. This step is not released.",
                "Do not seed or restore the noise_generator while training, and leave torch.normal and the optimizer's "
                "add_noise as they are. Without noise_generator= and seed= the operating system seeds the noise.",
                path=path,
            )
        )

    def _refuse(self, finding: Finding) -> NoReturn:
        for p in self._parameters:
            p.grad = None
        self._guarded.forget_sum()
        self._guarded.handle.finish()
        raise NoiseError(finding)


class Numbers:
    """Some numbers of every parameter: its first ones, and as many next to each other at another place in every step.

    A small parameter is read as a whole. One array has the numbers of all parameters; those that are read together stand
    next to each other. There is memory for the numbers of :data:`TOGETHER` steps.

    Args:
        parameters: the parameters by name.

    Attributes:
        names: the names in the order of the array.
        counts: how many numbers of every parameter are read.
        starts: where they begin in the array.
        likely: where those of every parameter begin and end in :meth:`first_ones`, and between what the sum of their squares
            likely is, in units of the noise's variance.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        all_sizes = np.array([p.numel() for p in parameters.values()])
        run = PRINT
        while 2 * run < all_sizes.max() and np.minimum(all_sizes, 4 * run).sum() <= LOOKED_AT:
            run *= 2
        together: dict[Any, list[str]] = {}
        for name, p in parameters.items():
            together.setdefault((p.device, p.dtype, p.numel() <= 2 * run), []).append(name)
        together = dict(sorted(together.items(), key=lambda kind: str(kind[0])))
        self.names = [name for names in together.values() for name in names]
        sizes = np.array([parameters[name].numel() for name in self.names])
        whole = sizes <= 2 * run
        self.counts = np.where(whole, sizes, 2 * run)
        self.starts = np.cumsum(self.counts) - self.counts
        self._run, self._sizes = run, np.where(whole, 2 * run, sizes)
        self._whole = [n if w else 0 for n, w in zip(sizes.tolist(), whole.tolist(), strict=True)]
        kinds = [(kind, len(names)) for kind, names in together.items()]
        self._memory = Memory(kinds, self.counts, run)
        self._random = np.random.default_rng()  # from the operating system; the script's generators stay as they are
        self._coming: Iterator[list[int]] = iter(())
        self._strides: list[tuple[int, int]] = []
        self._units: list[tuple[float, float]] = []  # of the steps that are kept
        few = np.minimum(self.counts, PRINT)
        ends = np.cumsum(few)
        least = few / np.where(few == PRINT, 16, FEW)
        most = few + STANDS_OUT * np.sqrt(2 * few)
        self.likely = list(zip(*(of.tolist() for of in (ends - few, ends, least, most)), strict=True))

    @property
    def waiting(self) -> int:
        """How many steps are kept."""
        return len(self._units)

    def move(self) -> None:
        """Go to other places."""
        jumps = next(self._coming, None)
        if jumps is None:
            anywhere = self._random.integers(1, self._sizes, (AHEAD, len(self._sizes)))
            # what would reach over an end is moved inside, so that numbers near the ends are read as often as the others
            self._coming = iter(anywhere.clip(self._run, self._sizes - self._run).tolist())
            jumps = next(self._coming)
        self._strides = [(jump, 1) for jump in jumps]

    def part_of(self, place: int) -> int:
        """The parameter that a number of the array belongs to."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def copy(self, tensors: Sequence[torch.Tensor], *, after: bool) -> None:
        """Copy the numbers at the present places.

        Args:
            tensors: one for every parameter, of its shape.
            after: into the second copy, not into the first.
        """
        if not all(map(torch.Tensor.is_contiguous, tensors)):
            tensors = [t.contiguous() for t in tensors]
        shape = 2, self._run
        views = [
            t.as_strided(shape, strides) if not whole else t if t.dim() == 1 else t.view(whole)
            for t, whole, strides in zip(tensors, self._whole, self._strides, strict=True)
        ]
        for of, out in self._memory.groups[len(self._units)][after]:
            torch.cat(views[of], out=out)

    def values(self) -> NDArray[np.float64]:
        """Both copies of this step, the numbers of one parameter after those of another; shape ``[2, numbers]``."""
        step = len(self._units)
        self._memory.arrive(step)
        return self._memory.arrays(slice(step, step + 1))[0]

    def first_ones(self) -> tuple[list[float], list[float]]:
        """The first 8 numbers of every parameter in both copies of this step, or all it has, one after the other."""
        step = len(self._units)
        self._memory.arrive(step)
        before: list[float] = []
        after: list[float] = []
        for numbers, size, places in self._memory.first:
            base = 2 * step * size
            for start, end in places:
                before += numbers[base + start : base + end].tolist()
                after += numbers[base + size + start : base + size + end].tolist()
        return before, after

    def keep(self, of_sum: float, of_result: float) -> None:
        """Keep both copies of this step, to be multiplied by these units."""
        self._units.append((of_sum, of_result))

    def take(self) -> NDArray[np.float64]:
        """What was kept, in its units, which is forgotten then; shape ``[steps, 2, numbers]``."""
        units, self._units = self._units, []
        return self._memory.arrays(slice(len(units))) * np.array(units)[..., np.newaxis]


class Memory:
    """Memory for two copies of some numbers of every parameter in several steps.

    Args:
        kinds: device, dtype and whether they are read as a whole, of parameters that are read together, and their number.
        counts: how many numbers of every parameter are read.
        run: length of a run.

    Attributes:
        groups: for every step and either copy, which parameters are read together, and the memory that gets their numbers.
        first: for every device and dtype: all numbers of all steps on the CPU, how many a copy of a step has, and where
            those of every parameter that come first begin and end in it.
    """

    def __init__(
        self, kinds: Sequence[tuple[tuple[torch.device, torch.dtype, bool], int]], counts: NDArray[np.int64], run: int
    ) -> None:
        self._elsewhere: list[tuple[torch.Tensor, torch.Tensor]] = []  # numbers on another device, and their place here
        self._here: list[NDArray[Any]] = []
        self.groups: list[tuple[list[tuple[slice, torch.Tensor]], ...]] = [([], []) for _ in range(TOGETHER)]
        self.first: list[tuple[memoryview, int, list[tuple[int, int]]]] = []
        begin = 0
        for (device, dtype), together in itertools.groupby(kinds, key=lambda kind: kind[0][:2]):
            parts, all_of = [], begin
            for (_, _, whole), number in together:
                of = slice(begin, begin := begin + number)
                parts.append((of, whole, int(counts[of].sum())))
            sizes = [size for *_, size in parts]
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            buffer = torch.empty(TOGETHER, 2, sum(sizes), dtype=precise, device=device)
            for step, groups in zip(buffer, self.groups, strict=True):
                for group, row in zip(groups, step, strict=True):
                    for (of, whole, _), out in zip(parts, row.split(sizes), strict=True):
                        group.append((of, out if whole else out.view(-1, run)))
            here = buffer if device.type == "cpu" else torch.empty_like(buffer, device="cpu")
            if here is not buffer:
                self._elsewhere.append((buffer, here))
            self._here.append(here.numpy())
            ends = np.cumsum(counts[all_of:begin])
            starts = ends - counts[all_of:begin]
            places = zip(starts.tolist(), np.minimum(ends, starts + PRINT).tolist(), strict=True)
            self.first.append((self._here[-1].reshape(-1).data, sum(sizes), list(places)))

    def arrive(self, step: int) -> None:
        """Bring a step's numbers from other devices."""
        for buffer, here in self._elsewhere:
            here[step].copy_(buffer[step])

    def arrays(self, steps: slice) -> NDArray[np.float64]:
        """Numbers of some steps that have arrived, in double precision; shape ``[steps, 2, numbers]``."""
        return np.concatenate([array[steps] for array in self._here], -1, dtype=np.float64)
