"""Calling modules with other tensors in the place of their parameters."""
