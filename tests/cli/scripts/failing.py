"""A script that fails before it trains."""

from common import parts

model, optimizer, loader = parts()
raise RuntimeError("no such data")
