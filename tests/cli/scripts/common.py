"""What the small scripts share: blobs in three classes, and a small model."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def points(samples=60):
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(samples) % 3
    return TensorDataset(torch.randn(samples, 6, generator=draw) + 2 * y[:, None], y)


def parts(dataset=None, batch_size=12, **options):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = DataLoader(points() if dataset is None else dataset, batch_size=batch_size, shuffle=True, **options)
    return model, torch.optim.SGD(model.parameters(), lr=0.5), loader
