"""A right script, which writes results and a checkpoint into its folder."""

import argparse
from pathlib import Path

import torch
from common import parts
from torch import nn

import dpfix

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=0)
workers = parser.parse_args().workers
model, optimizer, loader = parts(num_workers=workers)
criterion = nn.CrossEntropyLoss()
private = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, criterion=criterion
)
model, optimizer, loader = private
Path("results").mkdir(exist_ok=True)
for epoch in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        with Path("results/log.txt").open("a") as log:
            print(epoch, loss.item(), file=log)
        torch.save(private[0].state_dict(), "model.pt")
