"""Engines that give every sample parameters of its own: under ``vmap``, or one sample after the other."""
