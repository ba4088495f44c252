"""A script that does not come to its first step in time."""

import time

from common import parts

model, optimizer, loader = parts()
time.sleep(600)
