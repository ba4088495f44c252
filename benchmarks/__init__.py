"""What the figures of the documentation are measured with; each is run as ``python -m benchmarks.NAME``."""
