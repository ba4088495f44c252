"""Weights in, weights out: equivalence of modules, export to the original architecture, checkpoints of elsewhere."""

from dpfix.weights.equivalence import Difference, EquivalenceReport, compare_outputs, verify_equivalence
from dpfix.weights.load import LoadReport, load_pretrained
from dpfix.weights.recorded import LegacyReport, Recording, verify_legacy

__all__ = [
    "Difference",
    "EquivalenceReport",
    "LegacyReport",
    "LoadReport",
    "Recording",
    "compare_outputs",
    "load_pretrained",
    "verify_equivalence",
    "verify_legacy",
]
