"""``dpfix check``: a script's first private steps, looked at from outside, and replayed on neighbouring data."""
