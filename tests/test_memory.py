"""Memory that a call has freed is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALL = """
import torch, warnings
from torch import nn
from torch.utils.data import DataLoader
import dpfix

warnings.simplefilter("ignore")
torch.set_num_threads(1)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
sizes = (256, 1024, 1024, 1024, 1024, 10)
model = nn.Sequential(*(part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.ReLU())))
data = [(torch.randn(256), i % 10) for i in range(32)]
step = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    step(model, torch.utils.data.default_collate(data)).backward()
    optimizer.step()
optimizer.zero_grad()
before = resident()
training = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0,
    training_step=step, grad_sample_mode="bookkeeping", cache=False,
)
print((resident() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_what_a_call_has_freed_is_given_back() -> None:
    """In models: 11 without giving back, of which nothing is referenced any more."""
    out = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True, timeout=300).stdout
    assert float(out) < 4
