"""``transformers.Trainer`` in private training, and its subclasses (TRL's ``SFTTrainer``): one line, the rest stays as it is."""

from dpfix.integrations.huggingface.callback import PrivateCallback, make_private

__all__ = ["PrivateCallback", "make_private"]
