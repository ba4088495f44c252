"""Weights: equivalence of modules, export to the original architecture, checkpoints of other packages."""

from dpfix.weights.equivalence import EquivalenceReport, verify_equivalence
from dpfix.weights.export import changed_layers, export_plain, plain_state_dict, save_plain
from dpfix.weights.load import LoadReport, load_pretrained
from dpfix.weights.outputs import Difference, compare_outputs
from dpfix.weights.recorded import LegacyReport, Recording, verify_legacy

__all__ = [
    "Difference",
    "EquivalenceReport",
    "LegacyReport",
    "LoadReport",
    "Recording",
    "changed_layers",
    "compare_outputs",
    "export_plain",
    "load_pretrained",
    "plain_state_dict",
    "save_plain",
    "verify_equivalence",
    "verify_legacy",
]
