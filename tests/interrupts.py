"""Interrupts at any line of dpfix, and what they leave behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import dpfix
from tests.helpers import generator_states

ROOT = str(Path(dpfix.__file__).parent)


class Lines:
    """Counts the lines of dpfix that a function runs, and stops it at one of them.

    Args:
        at: the number of the line at which the interrupt comes; 0 for none.
        error: what comes there.
        within: the file whose lines count; all of dpfix without.
        function: the function in it whose lines count; all without.
    """

    def __init__(
        self, at: int = 0, error: type[BaseException] = KeyboardInterrupt, within: str = "", function: str = ""
    ) -> None:
        self.at, self.error, self.within, self.function = at, error, within, function
        self.count, self.place = 0, ""
        self.last: dict[tuple[str, int], int] = {}

    def run(self, act: Callable[[], Any]) -> bool:
        """Run a function; returns whether the interrupt came out of it."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            act()
        except self.error:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        counts = name.startswith(ROOT) and name.endswith(self.within) and self.function in ("", frame.f_code.co_name)
        return self._line if counts else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            self.last[frame.f_code.co_filename, frame.f_lineno] = self.count
            if self.count == self.at:
                self.place = f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}"
                raise self.error
        return self._line


def lines_of(act: Callable[[], Any]) -> list[int]:
    """When each line of dpfix that a function runs is run for the last time."""
    counted = Lines()
    counted.run(act)
    return sorted(counted.last.values())


def fingerprint(given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about the objects of a call that a script could notice, compared by identity and value."""
    seen: dict[str, Any] = {}
    module = given["module"]
    for path, m in module.named_modules(remove_duplicate=False):
        seen[f"class of {path}"] = type(m)
        for name, value in vars(m).items():
            seen[f"{path}.{name}"] = _of(value)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        seen[f"tensor {name}"] = (
            type(t), t.requires_grad, id(t.grad), {k: _of(v) for k, v in vars(t).items()},
            len(t._backward_hooks or ()), len(getattr(t, "_post_accumulate_grad_hooks", None) or ()),
        )  # fmt: skip
        if not torch.nn.parameter.is_lazy(t):
            seen[f"values of {name}"] = (t.data_ptr(), tuple(t.detach().flatten().tolist()))
    for what in ("optimizer", "data_loader"):
        seen[f"class of {what}"] = type(given[what])
        seen |= {f"{what}.{name}": _of(value) for name, value in vars(given[what]).items()}
    seen["groups"] = [{k: _of(v) for k, v in group.items()} for group in given["optimizer"].param_groups]
    python, numpy, cpu = generator_states()
    seen["generators"] = (python, numpy[1].tolist(), numpy[2:], tuple(cpu.tolist()))
    seen["modes"] = (
        torch.is_grad_enabled(), torch.overrides._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(), torch._C._get_torch_function_state(),  # type: ignore[attr-defined]
    )  # fmt: skip
    return seen


def _of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, (str, int)) else id(key): _of(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_of(v) for v in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.device.type != "meta":
        return id(value), tuple(value.detach().flatten().tolist())
    return id(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key, "none") != after.get(key, "none"))


def spread(lines: list[int], parts: int, seed: int = 0, last: int = 10) -> Iterator[int]:
    """Some of the lines of a run: one in each of so many parts of equal length, and the last ones."""
    draw, total = torch.Generator().manual_seed(seed), len(lines)
    for part in range(parts):
        low, high = part * total // parts, (part + 1) * total // parts
        if high > low:
            yield lines[low + int(torch.randint(high - low, (), generator=draw))]
    yield from lines[len(lines) - last :]


def in_thread(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread
