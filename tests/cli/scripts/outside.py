"""A script that writes to an absolute path."""

import sys

import torch

torch.save({}, sys.argv[1])
