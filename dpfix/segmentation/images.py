"""Writing a label map as the image it belongs to, by the properties that nnU-Net exported with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpfix.errors import SegmentationError


def write_segmentation(segmentation: np.ndarray, path: Path, properties: Mapping[str, Any]) -> Path:
    """Write a label map.

    Args:
        segmentation: ``[*spatial]``, labels.
        path: the file, with the ending of an image format; without properties ``.npz`` is written instead.
        properties: nnU-Net's properties of the case.

    Returns:
        The file that was written.

    Raises:
        SegmentationError: the properties belong to an image format that is not written here.
    """
    labels = segmentation.astype(np.uint8 if segmentation.max() < 255 else np.uint16)
    if not properties:
        path = path.with_name(path.name.partition(".")[0] + ".npz")
        np.savez_compressed(path, segmentation=labels)
    elif "sitk_stuff" in properties:
        _with_simpleitk(labels, path, properties["sitk_stuff"])
    elif "nibabel_stuff" in properties:
        _with_nibabel(labels, path, properties["nibabel_stuff"])
    else:
        raise SegmentationError(
            f"{path.name}: its properties are neither SimpleITK's nor nibabel's, so dpfix cannot write the image.",
            help="Use ensemble_probabilities and segmentation_from_probabilities, and write the label map with your own "
            "reader.",
            path=str(path),
        )
    return path


def _with_simpleitk(labels: np.ndarray, path: Path, geometry: Mapping[str, Any]) -> None:
    import SimpleITK  # pyright: ignore[reportMissingImports]

    image = SimpleITK.GetImageFromArray(labels[0] if len(geometry["spacing"]) == 2 else labels)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    if "original_orientation" in geometry:
        image = SimpleITK.DICOMOrient(image, geometry["original_orientation"])
    SimpleITK.WriteImage(image, str(path), True)


def _with_nibabel(labels: np.ndarray, path: Path, geometry: Mapping[str, Any]) -> None:
    import nibabel
    from nibabel import orientations

    original = geometry["original_affine"]
    image = nibabel.Nifti1Image(labels.transpose(2, 1, 0), geometry.get("reoriented_affine", original))
    if "reoriented_affine" in geometry:
        own = orientations.io_orientation(original)
        back: Any = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), own)
        image = image.as_reoriented(back)
    nibabel.save(image, path)
