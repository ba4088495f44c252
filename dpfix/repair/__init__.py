"""The only code that changes a model or an optimizer, and the cure of a loss."""
