"""Thin adapters to other packages, imported only when asked for."""

"""Optional integrations; nothing here is imported before it is asked for."""
