"""What has to hold on every real step, one small class per check; :mod:`dpfix.training.step_guard` runs them.

A new check is one class here, derived from :class:`~dpfix.training.guards.check.Check`, and one entry in the tuple of
``StepGuard``. Its docstring says what it catches and what a step pays for it.
"""
