"""What must not go wrong in long use: measured for docs/reliability.md by ``python -m benchmarks.soak``."""
