"""What nnunetv2 makes of some exports, beside dpfix: Dice per region, and whether every voxel is the same.

``python -m benchmarks.nnunet_ensembling`` needs nnunetv2 (``pip install dpfix[nnunet]``). ``--nnunet DIR`` puts another
installation first on the path (``pip install --no-deps --target DIR nnunetv2==2.6.4``); ``--write`` records exports and
results of this version in ``tests/segmentation/nnunetv2.npz`` beside what is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dpfix.segmentation import Regions, ensemble_probabilities, region_dice, segmentation_from_probabilities
from tests.segmentation.exports import LABELS, ORDER, REGIONS, export, truth

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests/segmentation/nnunetv2.npz"
MEMBERS = 3


class Collected:
    """Stands in for nnU-Net's writer of images."""

    def write_seg(self, segmentation: np.ndarray, *rest: Any) -> None:
        self.segmentation = np.asarray(segmentation)


def by_nnunet(files: list[Path], kind: str, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and label map of one case."""
    from nnunetv2.ensembling.ensemble import average_probabilities, merge_files
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(REGIONS, ORDER) if kind == "regions" else LabelManager(LABELS, None)
    writer = Collected()
    merge_files(list(map(str, files)), str(scratch / "merged"), ".nii.gz", writer, manager)  # type: ignore[arg-type]
    return average_probabilities(list(map(str, files))), writer.segmentation


def dice(segmentation: np.ndarray, labels: np.ndarray) -> list[float]:
    import torch

    regions = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
    a, b = (regions.from_labels(torch.from_numpy(s.astype(np.int64))[None])[None] for s in (segmentation, labels))
    return region_dice(a, b)[0].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, help="folder with another nnunetv2")
    parser.add_argument("--write", action="store_true", help=f"record in {RECORDED.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.nnunet:
        sys.path.insert(0, str(options.nnunet))
    version = next(metadata.distributions(name="nnunetv2")).version
    recorded = dict(np.load(RECORDED)) if RECORDED.exists() else {}
    same = True
    print(f"nnunetv2 {version}; Dice of whole, core, enhancing")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for kind, order in (("regions", ORDER), ("labels", None)):
            files = [export(scratch / f"{kind}_{m}", m, kind, cases=1) / "case_0.npz" for m in range(MEMBERS)]
            mean, theirs = by_nnunet(files, kind, scratch)
            ours = segmentation_from_probabilities(ensemble_probabilities(files, kind=kind), regions_class_order=order)
            for who, segmentation in (("nnunetv2", theirs), ("dpfix", ours)):
                print(f"  {kind:8} {who:9}", *(f"{value:.3f}" for value in dice(segmentation, truth(0))))
            same &= bool((theirs == ours).all())
            recorded[f"{kind}_members"] = np.stack([np.load(file)["probabilities"] for file in files])
            recorded[f"{kind}_mean_{version}"] = mean
            recorded[f"{kind}_segmentation_{version}"] = theirs.astype(np.uint8)
    print("every voxel is the same" if same else "voxels differ")
    if options.write:
        np.savez_compressed(RECORDED, **recorded)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
