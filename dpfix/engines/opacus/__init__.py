"""Opacus's own ways to per-sample gradients."""
