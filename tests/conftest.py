"""Settings every test shares."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generators, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
