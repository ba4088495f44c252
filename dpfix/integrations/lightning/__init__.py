"""Lightning: a callback for its ``Trainer``. Needs ``pip install dpfix[lightning]``."""

from dpfix.integrations.lightning.callback import PrivateCallback

__all__ = ["PrivateCallback"]
