"""Loaders that accelerate has shared out among processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpfix.sampling.ranks import ALONE, Ranks
from dpfix.sampling.shared_out import for_all_ranks

data_loader = pytest.importorskip("accelerate.data_loader")


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize(("split", "together"), [(False, 8), (True, 4)])
def test_the_batch_size_is_that_of_all_processes(dispatch: bool, split: bool, together: int) -> None:
    """As accelerate counts it, whether each process reads its batches or one reads all of them."""
    own = DataLoader(TensorDataset(torch.arange(61)), batch_size=4, shuffle=True, drop_last=True)
    here = {"device": torch.device("cpu"), "put_on_device": True}
    prepared: Any = data_loader.prepare_data_loader(
        own, num_processes=2, process_index=1, split_batches=split, dispatch_batches=dispatch, **here
    )
    loader = for_all_ranks(prepared, Ranks(1, 2))
    assert (loader.batch_size, loader.drop_last, len(loader)) == (together, True, 61 // together)
    assert loader.dataset is own.dataset
    assert for_all_ranks(prepared, ALONE) is prepared
