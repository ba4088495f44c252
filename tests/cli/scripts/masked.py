"""Token losses that are divided by the number of tokens in the batch."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix

tokens = torch.randint(1, 9, (40, 6), generator=torch.Generator().manual_seed(0))
tokens[::2, 2:] = 0  # padding
model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
loader = DataLoader(TensorDataset(tokens), batch_size=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def step(model, batch):
    (t,) = batch
    losses = F.cross_entropy(model(t).flatten(0, 1), t.flatten(), reduction="none")
    mask = (t != 0).flatten()
    return (losses * mask).sum() / mask.sum()


model, optimizer, loader = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, training_step=step
)
for batch in loader:
    optimizer.zero_grad()
    step(model, batch).backward()
    optimizer.step()
