"""One thread at a time: calls and private steps share torch's global generators and global settings."""

from __future__ import annotations

import os
import threading

TURN = threading.RLock()
"""Held by every call of the public functions that try out a model, and by every private step."""

os.register_at_fork(after_in_child=TURN._at_fork_reinit)  # type: ignore[attr-defined]  # the thread that holds it is not in the child
