"""A terminal shows what is being done; a file gets nothing."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from dpfix.cli import progress as module
from dpfix.cli.progress import progress


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, with_rich: bool) -> str:
    """What stands on stderr, with every escape sequence."""
    read, write = os.openpty() if terminal else os.pipe()
    find = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: find(name) if with_rich else None)
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress("counting [1]") as say:
            say("half", 0.5)
            say("all", 1.0)
        stderr.write("end")
    monkeypatch.undo()
    text = b""
    while b"end" not in text:
        text += os.read(read, 4096)
    os.close(read)
    return text.decode().removesuffix("end")


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal_shows_it(monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    if with_rich:
        pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, terminal=True, with_rich=with_rich)
    assert "all" in text and text.rstrip("\r\n").endswith("\x1b[K" if not with_rich else "\x1b[2K")
    assert ("\u2501" in text) == with_rich  # the line of a bar


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    assert shown(monkeypatch, terminal=False, with_rich=with_rich) == ""


def test_it_is_over_after_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError), progress("counting"):
        raise ValueError
    assert capsys.readouterr().err.endswith("\x1b[K")
