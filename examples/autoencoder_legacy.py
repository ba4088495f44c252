"""Make the legacy checkpoint of ``examples/autoencoder.py``: ``python examples/autoencoder_legacy.py``.

Needs ``pip install --no-deps monai-generative==0.2.3``. Its AutoencoderKL is trained on the digits 0 to 4 of scikit-learn,
which stand for public data; the digits 5 to 9 stay for the private training. One file holds the weights, in half precision,
the other outputs of the model with these very weights, for :func:`dpfix.verify_legacy`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from generative.networks.nets import AutoencoderKL  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from sklearn.datasets import load_digits

WEIGHTS = Path(__file__).with_name("autoencoder_legacy.safetensors")
RECORDED = Path(__file__).with_name("autoencoder_legacy_recorded.pt")
ARCHITECTURE = {
    "spatial_dims": 2,
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}
EPOCHS, BATCH, KL_WEIGHT = 200, 64, 1e-4


def main() -> None:
    """Train, and save weights and recorded outputs."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images[digits.target < 5]).float()[:, None] / 8 - 1
    model = AutoencoderKL(num_channels=(8, 16), **ARCHITECTURE)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in images[torch.randperm(len(images))].split(BATCH):
            optimizer.zero_grad()
            restored, mean, sigma = model(batch)
            kl = 0.5 * (mean**2 + sigma**2 - 2 * sigma.log() - 1).flatten(1).sum(1).mean()
            ((restored - batch).abs().mean() + KL_WEIGHT * kl).backward()
            optimizer.step()
        schedule.step()
    rounded = {key: value.half() for key, value in model.eval().state_dict().items()}
    model.load_state_dict(rounded)
    save_file(rounded, WEIGHTS)
    with torch.no_grad():
        probe = images[:4].clone()  # a view would be saved with all images
        mean, sigma = model.encode(probe)
        recorded = [
            {"inputs": (probe,), "output": (mean, sigma), "method": "encode"},
            {"inputs": (mean,), "output": model.decode(mean), "method": "decode"},
        ]
    torch.save(recorded, RECORDED)
    error = (model.reconstruct(images) - images).abs().mean()
    sizes = [f"{file.name}: {file.stat().st_size / 1024:.0f} KiB" for file in (WEIGHTS, RECORDED)]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, error {error:.4f}, {', '.join(sizes)}")


if __name__ == "__main__":
    main()
