"""The proofs: the clipped sum equals a batch-of-one reference, and no sample feels another."""
