"""The script's random generators are left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def rng_untouched(*, only_on_error: bool = False) -> Iterator[None]:
    """Python's, NumPy's and torch's generators (CPU and CUDA) are afterwards as they were before.

    Args:
        only_on_error: put them back only if the body raises.

    Yields:
        Nothing.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and only_on_error):
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def generator_states() -> list[torch.Tensor]:
    """States of torch's default generators (CPU and CUDA); equal ones show that nothing was drawn in between.

    Returns:
        One tensor per generator.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]
