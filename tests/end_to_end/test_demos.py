"""The demos tell both sides by the same measure, and say of whom their epsilon speaks."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.architecture.test_docs import load

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/demo.md"
DEMOS = ("vnet", "volumes")


@pytest.fixture
def demo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load(f"examples/{request.param}.py")


def of(name: str) -> pytest.MarkDecorator:
    """For a test of one file."""
    return pytest.mark.parametrize("demo", [name], indirect=True)


@of("tuning")
def test_both_sides_are_tuned_alike(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, float]] = []
    dice = {("private", 0.1): {3: 0.5, 6: 0.75}, ("private", 0.3): {3: 0.8, 6: 0.7}}

    def train(side: str, lr: float) -> Mapping[int, float]:
        asked.append((side, lr))
        return dice.get((side, lr), {3: 0.1, 6: lr})

    chosen = demo.tune(train, (0.1, 0.3))
    assert sorted(asked) == [(side, lr) for side in ("not private", "private") for lr in (0.1, 0.3)]
    assert chosen == {"private": demo.Setting(0.3, 3), "not private": demo.Setting(0.3, 6)}
    said = capsys.readouterr().out
    assert "| private | 0.1 | 0.500 | 0.750 |" in said and "chosen, private: learning rate 0.3, 3 epochs" in said


@of("vnet")
def test_no_training_patch_reaches_into_validation_or_test(demo: ModuleType) -> None:
    where = torch.arange(180.0)[None, :, None].expand(32, -1, 32)
    patches = demo.training_patches(where, torch.ones(32, 180, 32, dtype=torch.int64), 200, seed=0)
    trained = torch.stack([patch["image"] for patch in patches]).unique()
    parts = {name: demo.tiles_of(where, where, slab)["image"].unique() for name, slab in demo.SLABS.items()}
    assert trained.numel() > 100 and not torch.isin(trained, torch.cat([*parts.values()])).any()
    assert not torch.isin(parts["validation"], parts["test"]).any()


@of("volumes")
def test_a_patient_is_one_unit(demo: ModuleType) -> None:
    """All items of a patient are drawn and clipped together, and nobody is in two parts."""
    made = demo.Demo(demo.parse(["--patients", "24", "--batch-size", "8"]))
    names = [item["patient"] for item in made.items]
    assert len(set(names)) == 24 and {names.count(name) for name in names} == {2, 4, 6}
    assert torch.equal(demo.volumes_of(7, 0)[0]["image"], demo.volumes_of(7, 0)[0]["image"])
    images = [volume["image"] for part in made.others.values() for patient in part for volume in patient]
    images += [volume["image"] for patient in range(24) for volume in demo.volumes_of(patient, 0)]
    assert len({float(image.sum()) for image in images}) == len(images)
    private = made.private(0.1)
    for batch in private[2]:
        assert all(batch["patient"].count(name) == names.count(name) for name in set(batch["patient"]))
        made.criterion(private[0](batch["image"]), batch["label"]).backward()
        private[1].step()
        break
    statement = private.statement(1e-3)
    assert statement.unit.startswith("one person with all items") and statement.sampling_rate == pytest.approx(8 / 24)


# ------------------------------------------------------------------ what the page says


def block(command: str) -> str:
    """What the page shows as the output of a command."""
    (found,) = re.findall(rf"^{re.escape(command)}\n+```text\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return found


def constants(name: str) -> dict[str, str]:
    """What is assigned at the top of a demo, as source."""
    tree = ast.parse((ROOT / f"examples/{name}.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}


@pytest.mark.parametrize("name", DEMOS)
def test_chosen_settings_are_those_of_the_printed_grid(name: str) -> None:
    """The grid on the page is that of the file, the best of each side is what is chosen, and the file trains with that."""
    tuned = block(f"`python examples/{name}.py --tune`")
    lines = re.findall(r"^\| (private|not private) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", tuned, re.M)
    rates, epochs = ast.literal_eval(constants(name)["(RATES, EPOCHS)"])
    for side in ("private", "not private"):
        of_side = {float(lr): tuple(map(float, dice)) for s, lr, *dice in lines if s == side}
        assert tuple(sorted(of_side)) == rates
        best = max((dice, lr, e) for lr, values in of_side.items() for e, dice in zip(epochs, values, strict=True))
        said = re.search(rf"^chosen, {side}: learning rate ([\d.]+), (\d) epochs$", tuned, re.M)
        assert said and best[1:] == (float(said[1]), int(said[2]))
        assert f"'{side}': Setting({float(said[1])}, {said[2]})" in constants(name)["CHOSEN"]


def test_readme_names_what_the_demos_printed() -> None:
    words = " ".join((ROOT / "README.md").read_text().split())
    for name in DEMOS:
        printed = re.findall(r"^(?:not )?private: .*test Dice ([\d.]+)", block(f"`python examples/{name}.py`"), re.M)
        assert len(printed) == 2
        assert f"{printed[0]} with privacy and {printed[1]} without" in words
