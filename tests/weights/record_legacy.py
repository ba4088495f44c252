"""Record outputs of monai-generative 0.2.3: ``python -m tests.weights.record_legacy``.

Needs ``pip install --no-deps monai-generative==0.2.3``. Every network of the zoo is built with weights drawn from a seed
and called; the shapes of its weights and its outputs go into ``tests/weights/recorded/``. No weights are stored.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.weights.legacy_zoo import REFUSED, ZOO, Legacy

FOLDER = Path(__file__).parent / "recorded"


def file_of(case: Legacy) -> Path:
    """Where the recording of a network is; counterparts with other options in MONAI share it."""
    return FOLDER / f"{case.cls}-{fingerprint(case)}.npz"


def fingerprint(case: Legacy) -> str:
    """A short name for the arguments of the old network that are not those of the first of its class."""
    first = next(other for other in (*ZOO, *REFUSED) if other.cls == case.cls).old
    changed = [f"{k}={v}" for k, v in sorted(case.old.items()) if first.get(k) != v]
    return re.sub(r"[^a-z0-9=_.]+", "-", ",".join(changed).lower()).strip("-") or "plain"


def save(case: Legacy, shapes: dict[str, Tensor], outputs: dict[str, list[Tensor]]) -> None:
    """Write one recording."""
    arrays: dict[str, np.ndarray] = {
        "keys": np.array(list(shapes)),
        "shapes": np.array([f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for v in shapes.values()]),
    }
    fixed = {k: v for k, v in shapes.items() if not v.is_floating_point() or k.endswith("causal_mask")}
    arrays |= {f"fixed {k}": v.numpy() for k, v in fixed.items()}
    arrays |= {f"output {m} {i}": t.numpy() for m, tensors in outputs.items() for i, t in enumerate(tensors)}
    np.savez_compressed(file_of(case), **arrays)


def load(case: Legacy) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The weights of the old network, drawn anew from the seed, and its recorded outputs by method."""
    with np.load(file_of(case)) as arrays:
        empty = {}
        for key, told in zip(arrays["keys"], arrays["shapes"], strict=True):
            dtype, shape = told.split(" ", 1)
            sizes = [int(n) for n in re.findall(r"\d+", shape)]
            there = f"fixed {key}" in arrays
            empty[str(key)] = (
                torch.from_numpy(arrays[f"fixed {key}"]) if there else torch.empty(sizes, dtype=getattr(torch, dtype))
            )
        outputs = {
            method: [torch.from_numpy(arrays[k]) for k in arrays if k.startswith(f"output {method} ")]
            for method in case.calls
        }
    return case.weights(empty), outputs


def main() -> None:
    """Record all networks."""
    from generative.networks import nets  # pyright: ignore[reportMissingImports]

    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.npz"):
        old.unlink()
    for case in (*ZOO, *REFUSED):
        model = case.build_old(nets)
        runs = case.old.get("is_vae", True)  # without a VAE, SPADENet of 0.2.3 fails in its own forward
        outputs = {method: case.run(model, method) for method in case.calls} if runs else {}
        save(case, model.state_dict(), outputs)
    written = list(FOLDER.glob("*.npz"))
    print(f"{len(written)} recordings, {sum(f.stat().st_size for f in written) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
