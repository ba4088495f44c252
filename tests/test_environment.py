"""Wherever a script runs: no home, a hostile cache, other defaults of torch."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.choose import plan_cache
from tests.cases import Recurrent
from tests.helpers import setting, train


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script's folder, in which nothing is asked for, with nothing that says where a cache is to be."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("DPFIX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def nobody(uid: int) -> Any:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def trains() -> None:
    training = dpfix.make_private_safe(**setting())
    train(training, 1)


def test_without_a_home_nothing_is_remembered(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    trains()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("home", ["", "home", "{tmp}/gone"])
def test_no_folder_is_made_where_no_home_is(home: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home.format(tmp=here.parent))
    trains()
    assert list(here.iterdir()) == [] and not (here.parent / "gone").exists()


def test_a_relative_cache_folder_of_the_desktop_is_ignored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG base directory specification says."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    trains()
    assert list(here.iterdir()) == [] and list((here.parent / ".cache" / "dpfix").iterdir())


def test_the_folder_that_was_asked_for_is_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFIX_CACHE_DIR", "~/mine/plans")
    trains()
    assert list(here.iterdir()) == [] and list((here.parent / "mine" / "plans").iterdir())
    monkeypatch.delenv("DPFIX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here.parent / "xdg"))
    trains()
    assert list((here.parent / "xdg" / "dpfix").iterdir())


HOSTILE = (
    b"[" * 100_000, b'{"seconds": ' * 50_000, b'{"seconds": {"hooks": NaN}}', b'{"seconds": {"hooks": true}}',
    b'{"seconds": {"hooks": -1}}', b'{"seconds": {"hooks": 1' + b"0" * 5000 + b"}}", b"\xff\xfe", b'{"seconds": []}',
    b'{"seconds": {"": 1}}', b"null", b"x" * 10_000_000,
)  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=lambda c: repr(c[:20]))
def test_a_hostile_cache_is_as_good_as_none(content: bytes) -> None:
    Path(os.environ["DPFIX_CACHE_DIR"], "plan.json").write_bytes(content)
    assert plan_cache.remembered("plan") is None


def test_a_pipe_in_the_place_of_a_cache_is_not_waited_for() -> None:
    os.mkfifo(Path(os.environ["DPFIX_CACHE_DIR"], "plan.json"))
    assert plan_cache.remembered("plan") is None


def test_a_file_that_cannot_be_put_there_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    trains()
    assert list(Path(os.environ["DPFIX_CACHE_DIR"]).iterdir()) == []


# ------------------------------------------------------------------ defaults of torch


@pytest.fixture
def defaults() -> Iterator[None]:
    """The defaults of torch come back."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def image_setting() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(12, 3, 8, 8, generator=draw), torch.randint(0, 3, (12,), generator=draw))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 3)
    )  # fmt: skip
    return setting(model, data_loader=DataLoader(data, batch_size=4))


def recurrent_setting() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(12, 5, 4, generator=draw), torch.arange(12) % 3)
    return setting(Recurrent(nn.GRU(4, 5, batch_first=True), 5), data_loader=DataLoader(data, batch_size=4))


MAKERS = {"mlp": setting, "images": image_setting, "recurrent": recurrent_setting}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("mlp", mode) for mode in ("auto", "bookkeeping", "vmap", "microbatch", "hooks", "functorch")),
        *(("images", mode) for mode in ("bookkeeping", "vmap", "hooks")),
        *(("recurrent", mode) for mode in ("bookkeeping", "hooks")),
    ],
)
@pytest.mark.parametrize("default", ["meta", "float64"])
def test_defaults_of_torch_at_the_call_change_nothing(default: str, name: str, mode: str, defaults: None) -> None:
    """The model, on the CPU in single precision, was made before."""
    wanted = _released(name, mode)
    found = _released(name, mode, default)
    assert all(a.dtype == b.dtype and a.device == b.device for a, b in zip(wanted, found, strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found, strict=True))


def _released(name: str, mode: str, default: str = "") -> list[torch.Tensor]:
    """The weights after an epoch."""
    torch.manual_seed(0)
    given = MAKERS[name]() | {"grad_sample_mode": mode, "seed": 1, "cache": False}
    if default == "meta":
        torch.set_default_device("meta")
    elif default:
        torch.set_default_dtype(torch.float64)
    model, optimizer, loader = dpfix.make_private_safe(**given)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in given["module"].parameters()]
