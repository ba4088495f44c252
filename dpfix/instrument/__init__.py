"""Ground floor: walking trees of tensors, watching a run and leaving no trace of it."""
