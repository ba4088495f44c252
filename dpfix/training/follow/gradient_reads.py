"""A loop that reads ``p.grad`` of a private parameter before the step finds nothing there yet."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType

import torch
from torch import nn

from dpfix.errors import MisuseError
from dpfix.instrument.source import is_users_file, takes_attribute, warn_user
from dpfix.training.follow import messages


class GradientReads:
    """Says so: once in a warning, or in the error that ``p.grad.norm()`` would end in.

    Args:
        parameters: the private ones, by name.

    Attributes:
        told: whether it has been said.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.told = False

    def look(self, p: torch.Tensor, frame: FrameType) -> None:
        """A gradient is read.

        Args:
            p: whose.
            frame: the code that reads it.

        Raises:
            MisuseError: it goes on to take an attribute of ``None``.
        """
        file = frame.f_code.co_filename
        if p.grad is not None or self.told or not (is_users_file(file) or file.endswith("clip_grad.py")):
            return
        if not any(p is own for own in self._parameters.values()):
            return
        if takes_attribute(frame):
            raise MisuseError(*messages.NO_GRADIENT_YET, path="parameters")
        self.told = True
        warn_user(" ".join(messages.NO_GRADIENT_YET))
