"""The script's random generators are left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class GeneratorStates:
    """States of the global generators: Python's, NumPy's and torch's (CPU and CUDA)."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> GeneratorStates:
        """The present states."""
        return cls(random.getstate(), np.random.get_state(), *_torch_states())

    def put_back(self) -> None:
        """The generators go on from here; those of CUDA only where there is one."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda[: torch.cuda.device_count()])

    def as_plain_values(self) -> dict[str, Any]:
        """The states as tensors, numbers and text, which a file can hold without code."""
        kind, keys, position, has_gauss, gauss = self.numpy
        numbers = torch.from_numpy(np.asarray(keys, dtype=np.int64))
        version, python, following = self.python
        return {
            "torch": self.cpu,
            "cuda": self.cuda,
            "numpy": [str(kind), numbers, int(position), int(has_gauss), float(gauss)],
            "python": [version, list(python), following],
        }

    @classmethod
    def from_plain_values(cls, saved: Mapping[str, Any]) -> GeneratorStates:
        """What :meth:`as_plain_values` was made from."""
        kind, keys, *rest = saved["numpy"]
        version, numbers, following = saved["python"]
        numpy = (kind, keys.cpu().numpy().astype(np.uint32), *rest)
        return cls((version, tuple(numbers), following), numpy, saved["torch"].cpu(), [s.cpu() for s in saved["cuda"]])


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Python's, NumPy's and torch's generators (CPU and CUDA) are afterwards as they were before.

    Yields:
        Nothing.
    """
    before = GeneratorStates.now()
    try:
        yield
    finally:
        before.put_back()


def generator_states() -> list[torch.Tensor]:
    """States of torch's default generators (CPU and CUDA); equal ones show that nothing was drawn in between.

    Returns:
        One tensor per generator.
    """
    cpu, cuda = _torch_states()
    return [cpu, *cuda]


def _torch_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda
