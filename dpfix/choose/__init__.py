"""The fastest engine among those that were proven."""
