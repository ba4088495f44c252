"""Small stand-ins for what a page of the documentation takes from its reader: a model, a loader, a file.

A page that is not named in :data:`STAND_INS` brings everything itself, and runs in an empty namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from monai.networks.nets import AutoencoderKL
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix

EXAMPLES = Path(__file__).parents[2] / "examples"


class Classifier(nn.Module):
    """A model with an encoder and a head, for patterns of names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).relu())


def ordinary() -> dict[str, Any]:
    """``model``, ``optimizer``, ``loader``, ``criterion``, and ``script``: the arguments that the reader's call has besides."""
    model = Classifier()
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 6, generator=draw), torch.randint(0, 3, (32,), generator=draw))
    named = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(data, batch_size=8),
        "criterion": nn.CrossEntropyLoss(),
    }
    script = {
        "module": model,
        "optimizer": named["optimizer"],
        "data_loader": named["loader"],
        "criterion": named["criterion"],
        "noise_multiplier": 1.0,
    }
    return {**named, "script": script}


def clipped() -> dict[str, Any]:
    """``script`` with its clip norm."""
    own = ordinary()
    own["script"]["max_grad_norm"] = 1.0
    return own


def in_training() -> dict[str, Any]:
    """A private training, what built its model, a file of public weights, and two equal models."""
    own = clipped()
    own["script"]["module"] = Classifier()
    own["script"]["optimizer"] = torch.optim.SGD(own["script"]["module"].parameters(), lr=0.1)
    started = {**own["script"], "module": own["model"], "optimizer": own["optimizer"]}
    private = dpfix.make_private_safe(**started)
    torch.save(Classifier().state_dict(), "public.pt")
    model, optimizer, loader = private
    new = {"model": model, "optimizer": optimizer, "loader": loader, "private": private, "build_model": Classifier}
    a = Classifier()
    b = Classifier()
    b.load_state_dict(a.state_dict())
    old = {**legacy(), "image": torch.rand(2, 1, 8, 8)}
    old["old"] = AutoencoderKL(**old["settings"])
    dpfix.load_pretrained(old["old"], "old.pt")  # computes what monai-generative's network computes
    return {**own, **new, **old, "a": a, "b": b, "inputs": torch.randn(2, 6)}


def legacy() -> dict[str, Any]:
    """A checkpoint of monai-generative with recorded outputs, the ``settings`` of its network, and a loader of images."""
    settings = {
        "spatial_dims": 2,
        "channels": (8, 16),
        "attention_levels": (False, True),
        "num_res_blocks": 1,
        "latent_channels": 2,
        "norm_num_groups": 4,
    }
    weights = safetensors.torch.load_file(EXAMPLES / "autoencoder_legacy.safetensors")
    safetensors.torch.save_file(weights, "old.safetensors")
    torch.save(weights, "old.pt")
    torch.save(torch.load(EXAMPLES / "autoencoder_legacy_recorded.pt", weights_only=True), "recorded.pt")
    return {"settings": settings, "images": DataLoader(TensorDataset(torch.rand(16, 1, 8, 8)), batch_size=8)}


def trainer() -> dict[str, Any]:
    """``MyTrainer``, a trainer of nnU-Net's kind."""
    return {"MyTrainer": type("MyTrainer", (), {})}


STAND_INS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "docs/autoencoder.md": legacy,
    "docs/clipping.md": ordinary,
    "docs/nnunet.md": trainer,
    "docs/noise.md": clipped,
    "docs/weights.md": in_training,
}
"""What the namespace of a page begins with."""
