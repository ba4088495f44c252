"""What several benchmarks share: models, both libraries, the released sum, time and memory, tables."""
