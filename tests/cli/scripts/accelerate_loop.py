"""A loop with accelerate, whose prepare() stands before the call or after it."""

import sys

from accelerate import Accelerator
from common import parts
from torch import nn

import dpfix

accelerator = Accelerator(cpu=True)
made = parts()
if sys.argv[1:] == ["before"]:
    made = accelerator.prepare(*made)
model, optimizer, loader = dpfix.make_private_safe(
    module=made[0], optimizer=made[1], data_loader=made[2], noise_multiplier=1.0, max_grad_norm=1.0
)
if sys.argv[1:] != ["before"]:
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(3):
    for x, y in loader:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
    accelerator.save_state("state")
