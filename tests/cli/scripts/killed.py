"""A script whose process is killed in its first step."""

import os
import signal

from common import parts
from torch import nn

import dpfix

model, optimizer, loader = parts()
private = dpfix.make_private_safe(
    module=model,
    optimizer=optimizer,
    data_loader=loader,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    criterion=nn.CrossEntropyLoss(),
)
os.kill(os.getpid(), signal.SIGKILL)
