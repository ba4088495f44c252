"""Segmentation: probabilities averaged once, regions and labels, voxels to ignore, Dice per case."""

from dpfix.segmentation.ensemble import (
    EnsembledCases,
    ensemble_probabilities,
    segmentation_from_probabilities,
)
from dpfix.segmentation.folders import ensemble_folders
from dpfix.segmentation.inference import predict_probabilities
from dpfix.segmentation.labelled import LabelledVoxelsLoss
from dpfix.segmentation.regions import Regions, region_dice
from dpfix.segmentation.values import check_probabilities

__all__ = [
    "EnsembledCases",
    "LabelledVoxelsLoss",
    "Regions",
    "check_probabilities",
    "ensemble_folders",
    "ensemble_probabilities",
    "predict_probabilities",
    "region_dice",
    "segmentation_from_probabilities",
]
