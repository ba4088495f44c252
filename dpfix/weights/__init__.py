"""Weights in, weights out: equivalence of modules, export to the original architecture, checkpoints of elsewhere."""

from dpfix.weights.equivalence import Difference, EquivalenceReport, compare_outputs, verify_equivalence

__all__ = ["Difference", "EquivalenceReport", "compare_outputs", "verify_equivalence"]
