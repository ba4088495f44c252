"""Ordinary training."""

from common import parts
from torch import nn

model, optimizer, loader = parts()
for x, y in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
