"""The random numbers of a training: its noise and its draws, which nobody else can repeat or disturb.

They come from generators that only this training draws from. A script that calls ``torch.manual_seed`` per epoch, in a
dataset or in an evaluation does not move them, and they do not move the script's. A forked process and a copy of a stream
begin anew from the operating system: two trainings with the same noise would show the difference of what they released.

A training belongs to one thread at a time, as its model does; trainings in several threads share no stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from dpfix.errors import DPFixError
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.ranks import Ranks, new_seed

CPU = torch.device("cpu")


def system_entropy() -> int:
    """128 bits from the operating system."""
    return int.from_bytes(os.urandom(16), "big")


class Stream:
    """Random numbers for one purpose, from a generator for every device.

    A copy, a pickled one or one in a forked process does not go on with the numbers; it is a new stream.

    Args:
        entropy: what all numbers follow from; from the operating system if not given.
    """

    def __init__(self, entropy: tuple[int, ...] | None = None) -> None:
        self._begin(entropy)

    def _begin(self, entropy: tuple[int, ...] | None) -> None:
        self._entropy = (system_entropy(),) if entropy is None else entropy
        self._process = os.getpid()
        self._generators: dict[tuple[torch.device, int], torch.Generator] = {}

    def __reduce__(self) -> Any:
        return type(self), ()

    def generator(self, device: torch.device = CPU, lane: int = 0) -> torch.Generator:
        """The generator on a device. Nobody keeps it: after a fork it is another one.

        Args:
            device: with its index.
            lane: which of several, where threads draw at the same time.

        Returns:
            The same one at every call.
        """
        if os.getpid() != self._process:
            self._begin(None)
        found = self._generators.get((device, lane))
        if found is None:
            place = (*device.type.encode(), device.index or 0, lane)
            found = self._generators.setdefault((device, lane), seeded(device, (*self._entropy, *place)))
        return found

    def branch(self, number: int) -> None:
        """Go on with other numbers, which follow from what all did until now and a number."""
        self._begin((*self._entropy, number))

    def anew(self) -> Stream:
        """What a copy of a training draws from."""
        return type(self)()

    def uniform(self, number: int) -> torch.Tensor:
        """Uniform numbers from 0 to 1, as of :func:`torch.rand`, in double precision."""
        return torch.rand(number, generator=self.generator(), dtype=torch.float64)

    def state(self) -> dict[str, torch.Tensor]:
        """Where the stream is, by device and lane."""
        return {f"{device}/{lane}": generator.get_state() for (device, lane), generator in self._generators.items()}

    def go_on(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from where another stream was, on the devices that are here too.

        Args:
            state: of the other stream.
        """
        for name, position in state.items():
            device, lane = device_and_lane(name)
            if device == CPU or device.index in range(torch.get_device_module(device).device_count()):
                self.generator(device, lane).set_state(position)


def device_and_lane(name: str) -> tuple[torch.device, int]:
    """What a name in :meth:`Stream.state` says."""
    device, _, lane = name.partition("/")
    return torch.device(device), int(lane)


class Given:
    """A generator that somebody else has made (Opacus's cryptographic one), in the place of a stream.

    Args:
        generator: on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def generator(self, device: torch.device = CPU) -> torch.Generator:
        """The generator, whatever the device."""
        return self._generator

    def anew(self) -> Given:
        """What a copy of a training draws from."""
        return self

    def uniform(self, number: int) -> torch.Tensor:
        """Uniform numbers from 0 to 1, as of :func:`torch.rand`, in double precision."""
        return torch.rand(number, generator=self._generator, dtype=torch.float64)


@dataclass(frozen=True)
class Randomness:
    """Where the noise and the draws of one training come from.

    Attributes:
        noise: source of the noise.
        draws: source of the Poisson draws; on several ranks it gives all of them the same numbers.
        seed: what the script has given so that both can be repeated, or ``None``.
    """

    noise: Stream | Cryptographic
    draws: Stream | Given | Cryptographic
    seed: int | None = None

    @classmethod
    def of(cls, seed: int | None, secure: Given | Cryptographic | None, ranks: Ranks) -> Randomness:
        """New randomness for a training.

        Args:
            seed: for numbers that can be repeated; from the operating system if ``None``.
            secure: source of noise and draws in secure mode; Opacus's own generator, if there is one, adds noise by itself.
            ranks: the processes that draw together; all of them have to call this.

        Returns:
            Noise and draws, independent of each other.
        """
        if isinstance(secure, Cryptographic):
            return cls(secure, secure)
        noise, draws = (Stream(None if seed is None else (seed, use)) for use in (0, 1))
        if ranks.sharded:  # each adds noise to parameters of its own, and equal noise on two would show
            noise = Stream(None if seed is None else (seed, 0, ranks.rank))
        if secure is not None:
            return cls(noise, secure, seed)
        if ranks.size > 1:
            draws = Stream((ranks.first(new_seed(draws.generator())),))
        draws.generator()  # a torch in which it cannot be made is found out before anything is changed
        return cls(noise, draws, seed)

    def state(self) -> dict[str, Any]:
        """Where a training with a seed is, in plain values; empty for one without, which nobody is to repeat."""
        streams = {"noise": self.noise, "draws": self.draws}
        if self.seed is None:
            return {}
        return {"seed": self.seed} | {name: s.state() for name, s in streams.items() if isinstance(s, Stream)}

    def go_on(self, state: Mapping[str, Any]) -> bool:
        """Go on with the numbers of a training that has the same seed.

        Args:
            state: of the other training.

        Returns:
            Whether it does; with another seed, or with one on one side only, noise and draws are new ones.
        """
        if self.seed is None or state.get("seed") != self.seed:
            return False
        for name, stream in {"noise": self.noise, "draws": self.draws}.items():
            if isinstance(stream, Stream):
                stream.go_on(state[name])
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Randomness:
        return replace(self, noise=self.noise.anew(), draws=self.draws.anew())


class OwnNoise(TorchFunctionMode):
    """Inside, normal numbers for which no generator is given come from a stream instead of torch's global generators.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    @override
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _NORMAL and given.get("generator") is None:
            tensors = [value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)]
            device = tensors[0].device if tensors else torch.empty(0, device=given.get("device")).device
            given["generator"] = self._stream.generator(device)
        return func(*args, **given)


_NORMAL = (torch.normal, torch.randn, torch.Tensor.normal_)


def seeded(device: torch.device, entropy: tuple[int, ...]) -> torch.Generator:
    """A generator that holds all the entropy that is given.

    On the CPU ``manual_seed`` would use 32 bits of it (Mersenne twister, seeded with one word): among 100,000 trainings two
    would have the same noise, and all noises could be tried out. Here the whole state is written.

    Args:
        device: where it draws.
        entropy: non-negative numbers.

    Returns:
        A new generator.

    Raises:
        DPFixError: this torch keeps the state of its generator in another form.
    """
    numbers, generator = np.random.SeedSequence(entropy), torch.Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
    state = generator.manual_seed(0).get_state()
    words = state.numpy().view(np.uint64)[3:627]  # after the seed, two flags and the position, which a seed leaves at 0
    if not np.array_equal(words, np.random.RandomState(0).get_state(legacy=False)["state"]["key"]):
        raise DPFixError(
            f"torch {torch.__version__} keeps the state of its CPU generator in a form that dpfix does not know,",
            "so it cannot be seeded with more than 32 bits, which can be tried out.",
            "Use a version of torch that dpfix was tested with.",
            path="torch",
        )
    words[:] = numbers.generate_state(624, np.uint32)
    return generator.set_state(state)
