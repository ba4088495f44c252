"""The networks of MONAI: a few of them measured as ``make zoo`` does, and the table that it wrote."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("monai")
from monai.networks import nets

from benchmarks.zoo import measure, networks

ROOT = Path(__file__).parents[2]
BLOCKS = {
    "BertAttention", "BertMixedLayer", "BertOutput", "HighResBlock", "PatchMerging", "PatchMergingV2", "Pooler",
    "ResNetBlock", "ResNetBottleneck",
}  # fmt: skip
FEW = ["UNet", "MILModel, att_trans", "ViT, class token", "DecoderOnlyTransformer", "VarAutoEncoder", "VQVAE"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((ROOT / "benchmarks/results/zoo.json").read_text())["rows"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MaskedAutoEncoderViT", "Transchex", "RegUNet"])
def test_network_needs_no_batches_of_one(name: str) -> None:
    row = measure.measure(next(n for n in networks.NETWORKS if n.name == name), opacus=False)
    assert row.verdict == measure.EXACT, row.reason
    assert row.engine in ("bookkeeping", "vmap")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_network_is_exact_or_refused_for_its_reason(name: str) -> None:
    network = next(n for n in networks.NETWORKS if n.name == name)
    row = measure.measure(network, opacus=False)
    assert row.expected, f"{row.verdict}: {row.reason}"
    assert row.verdict == (measure.REFUSED if network.refusal else measure.EXACT)


def test_a_wrong_sum_is_seen() -> None:
    """The comparison of the script itself: a gradient that is off in one parameter, or missing, is an error."""
    right = {"a": torch.ones(3, dtype=torch.float64), "b": torch.full((2,), 1e-3, dtype=torch.float64)}
    assert measure.worst(right, right) == 0
    assert measure.worst({**right, "b": 5 * right["b"]}, right) > 0.1
    assert measure.worst({"b": right["b"]}, right) == pytest.approx(1)
    assert measure.worst({**right, "a": torch.full((3,), torch.nan)}, right) == float("inf")


def test_every_network_of_monai_is_in_the_table() -> None:
    """A class of ``monai.networks.nets`` is built by a row, or noted as a variant of one, or a building block."""
    source = inspect.getsource(networks)
    variants = {name for others in networks.STANDS_FOR.values() for name in others}
    found = {v for v in vars(nets).values() if inspect.isclass(v) and issubclass(v, nn.Module)}
    aliases = {cls: [name for name, v in vars(nets).items() if v is cls] for cls in found}
    missing = [
        names for names in aliases.values()
        if not any(re.search(rf"nets\.{name}\b", source) or name in variants | BLOCKS for name in names)
    ]  # fmt: skip
    assert missing == []
    assert set(networks.STANDS_FOR) <= {n.name for n in networks.NETWORKS}


def test_page_is_the_one_that_was_measured(rows: dict[str, dict]) -> None:
    page = (ROOT / "docs/zoo.md").read_text()
    assert list(rows) == [n.name for n in networks.NETWORKS]
    assert [name for name in rows if f"| {name} |" not in page] == []


def test_no_network_is_wrong(rows: dict[str, dict]) -> None:
    """What was measured last: no network is trained on a wrong sum, and VQVAE is refused for its codebook."""
    assert [name for name, row in rows.items() if row["verdict"] == "wrong"] == []
    assert rows["VQVAE"]["verdict"] == "refused"
    assert rows["VQVAE"]["expected"]


@pytest.mark.slow
def test_whole_table() -> None:
    """The exit status says that dpfix was right with every network."""
    command = [sys.executable, "-m", "benchmarks.zoo"]
    subprocess.run(command, check=True, capture_output=True, timeout=7200, cwd=ROOT)
