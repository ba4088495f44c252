"""Every trainable network of ``monai.networks.nets``: run as ``python -m benchmarks.zoo``."""
