"""One training step on a probe, run under a recorder: what really happens."""
