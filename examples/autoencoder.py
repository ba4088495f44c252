"""MONAI's AutoencoderKL, trained privately from a checkpoint of monai-generative.

``python examples/autoencoder.py [--epochs 30] [--epsilon 8] [--write docs/autoencoder.md]``

The checkpoint beside this file was trained with monai-generative 0.2.3 on the digits 0 to 4 of scikit-learn (public; see
``autoencoder_legacy.py``). The digits 5 to 9 are private: 700 images to train on, the rest to measure the reconstruction
error on. The table has the checkpoint as it is, read by MONAI's own loader and by dpfix, and what training makes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import torch
from monai.networks.nets import AutoencoderKL
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.integrations.autoencoder import AutoencoderStep

HERE = Path(__file__).parent
WEIGHTS, RECORDED = HERE / "autoencoder_legacy.safetensors", HERE / "autoencoder_legacy_recorded.pt"
TRAIN, BATCH, DELTA, CLIP = 700, 64, 1e-4, 1.0
STEP = AutoencoderStep(reconstruction="l1", kl_weight=1e-4)
BEGINS, ENDS = "<!-- table begins -->", "<!-- table ends -->"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    start: str
    training: str
    epsilon: str
    error: float


def network() -> AutoencoderKL:
    """The network of the checkpoint, with random weights."""
    return AutoencoderKL(
        spatial_dims=2, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1, latent_channels=2, norm_num_groups=4,
    )  # fmt: skip


def private_digits() -> tuple[Tensor, Tensor]:
    """Images of the digits 5 to 9 in [-1, 1]: to train on, and to measure on."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[digits.target >= 5]).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:TRAIN]], images[order[TRAIN:]]


def from_checkpoint() -> AutoencoderKL:
    """The network with the converted weights, compared with what monai-generative computed."""
    model = network()
    assert (check := dpfix.verify_legacy(model, WEIGHTS, RECORDED, atol=1e-5)), str(check)
    dpfix.load_pretrained(model, WEIGHTS)
    return model


def from_checkpoint_by_monai() -> AutoencoderKL:
    """The same with MONAI's own loader."""
    model = network()
    with contextlib.redirect_stdout(io.StringIO()):
        model.load_old_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()})
    return model


def error(model: nn.Module, images: Tensor) -> float:
    """Mean absolute error of the reconstructions."""
    model = dpfix.export_plain(model).eval()
    with torch.no_grad():
        return float((model.reconstruct(images) - images).abs().mean())  # type: ignore[operator]


def train(model: nn.Module, optimizer: Any, loader: Any, epochs: int) -> None:
    """The usual loop."""
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            STEP(model, batch).backward()
            optimizer.step()


def privately(model: nn.Module, images: Tensor, epochs: int, epsilon: float) -> dpfix.PrivateTraining:
    """Train with a privacy budget."""
    training = dpfix.make_private_safe_with_epsilon(
        module=model.train(),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        data_loader=DataLoader(TensorDataset(images), batch_size=BATCH, shuffle=True),
        training_step=STEP,
        target_epsilon=epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=CLIP,
    )
    train(*training, epochs)
    return training


def in_the_open(model: nn.Module, images: Tensor, epochs: int) -> nn.Module:
    """The same training without privacy."""
    loader = DataLoader(TensorDataset(images), batch_size=BATCH, shuffle=True)
    train(model.train(), torch.optim.Adam(model.parameters(), lr=1e-3), loader, epochs)
    return model


def given_back(training: dpfix.PrivateTraining, images: Tensor) -> str:
    """Export to MONAI's own keys, load with torch alone, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        file = dpfix.save_plain(training[0], Path(folder) / "trained.safetensors")
        plain = network()
        plain.load_state_dict(load_file(file), strict=True)
    report = dpfix.verify_equivalence(plain, training[0], images[:4])
    assert report, str(report)
    return f"exported weights in a fresh AutoencoderKL: {report.max_difference:.0e}"


def rows(epochs: int, epsilon: float) -> list[Row]:
    """Run everything; results are printed as they come."""
    images, held_out = private_digits()
    read, old = f"checkpoint, MONAI {monai.__version__}'s loader", "checkpoint, dpfix"
    found = [
        Row(read, "none", "0", error(from_checkpoint_by_monai(), held_out)),
        Row(old, "none", "0", error(from_checkpoint(), held_out)),
    ]
    for start, model in ((old, from_checkpoint()), ("random weights", network())):
        begin = time.perf_counter()
        training = privately(model, images, epochs, epsilon)
        print(f"{start}: {training.plan.engine}, {time.perf_counter() - begin:.0f} s; {given_back(training, held_out)}")
        spent = f"{training.get_epsilon(DELTA):.2f}"
        found.append(Row(start, "private", spent, error(training[0], held_out)))
    found.append(Row(old, "not private", "infinite", error(in_the_open(from_checkpoint(), images, epochs), held_out)))
    return found


def main() -> None:
    """Print the table, and write it into a page if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--epsilon", type=float, default=8.0, help=f"budget at delta {DELTA:g}")
    parser.add_argument("--write", type=Path, help="page in which the table stands")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Secure RNG turned off|Optimal order is the")
    lines = ["| start | training | epsilon | error on held-out images |", "|---|---|---|---|"]
    lines += [
        f"| {r.start} | {r.training} | {r.epsilon} | {r.error:.3f} |" for r in rows(arguments.epochs, arguments.epsilon)
    ]
    print("\n".join(lines))
    if arguments.write is not None:
        before, _, rest = arguments.write.read_text().partition(BEGINS)
        arguments.write.write_text(f"{before}{BEGINS}\n" + "\n".join(lines) + f"\n{ENDS}{rest.partition(ENDS)[2]}")


if __name__ == "__main__":
    main()
