"""Run Opacus's own test-suite, from its wheel, with ``PrivacyEngine`` swapped for ``SafePrivacyEngine``.

``python -m tests.end_to_end.opacus_suite [--backend opacus|dpfix] [--known] [--examples N] [pytest arguments]``

Only the name ``PrivacyEngine`` inside the test modules is replaced; Opacus itself stays as it is. Torchvision
is stood in for when it is missing. The exit status is 0 when every failure is listed in ``ON_PURPOSE`` and
every test named there really fails; entries whose tests the pytest arguments leave out are not judged.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import opacus.tests
import pytest
import torch
from hypothesis import settings
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpfix.sampling import randomness

NAMES = "privacy_engine batch_memory_manager privacy_engine_validation gradient_accumulation poisson"

Transform = Callable[[Tensor], Tensor]

ON_PURPOSE: dict[str, str] = {
    "test_compare_to_vanilla": "noise of 1e20 makes the weights NaN; dpfix stops at a clipped sum that is not finite",
    "test_model_validator": "expects BatchNorm to be refused; dpfix repairs it, and then refuses because this model cannot "
    "take the data of the test (3 channels, data with 1 or none), which Opacus never tries",
    "test_validator_weight_update_check": "expects Opacus's wording for a foreign optimizer, and again a model that cannot "
    "take the data",
    "TextTest::test_make_private_with_epsilon": "the test does not say batch_first=False; Opacus's per-sample gradients are "
    "wrong for it, and dpfix refuses the mode the test asks for",
    "TextTestFunctorch::test_make_private_with_epsilon": "as above",
    "TextHooksTest::test_make_private_with_epsilon": "as above",
    "test_extra_param_ew": "expects the failure in forward; dpfix refuses when it is asked for the mode",
    "test_unsupported_ew": "as above",
    "test_deterministic_run": "seeds torch and expects equal noise and draws; those of dpfix come from generators of the "
    "training, and only seed= in the call makes two runs equal",
    "test_equivalent_to_one_batch": "as above",
    "CustomLayerTest::test_noise_level": "the few numbers of this model lie within 15 % of what is expected for one seed of "
    "torch, which the test sets for every example; noise that is new in each does not stay there in all of them",
    "CustomLayerHooksTest::test_noise_level": "as above",
}
"""Part of a test's id -> why dpfix differs from Opacus there on purpose."""

FIRST = 0
"""The first number in the place of what the operating system says, so that two runs of the suite say the same."""


class FakeData(Dataset[tuple[Tensor, int]]):
    """Torchvision's data set of random images: the same draws, as a uint8 tensor in place of a PIL image."""

    def __init__(
        self,
        size: int = 1000,
        image_size: tuple[int, ...] = (3, 224, 224),
        num_classes: int = 10,
        transform: Transform = lambda image: image,
    ) -> None:
        self.size, self.image_size = size, image_size
        self.num_classes, self.transform = num_classes, transform

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.size:
            raise IndexError(f"index {index} of {self.size}")
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(self.image_size, generator=generator)
        image = (noise * 255).long().remainder(256).to(torch.uint8)
        target = int(torch.randint(self.num_classes, (1,), generator=generator))
        return self.transform(image), target


def compose(transforms: list[Transform]) -> Transform:
    """Chain transforms, as ``transforms.Compose`` does."""
    return lambda image: reduce(lambda value, transform: transform(value), transforms, image)


def to_tensor() -> Transform:
    """Map bytes to floats in [0, 1], as ``transforms.ToTensor`` does."""
    return lambda image: image.float() / 255


def normalize(mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    """Centre and scale each channel, as ``transforms.Normalize`` does."""
    return lambda image: (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


class ConvNet(nn.Module):
    """ResNet-18 and DenseNet-121 as far as the tests go: three channels, BatchNorm, in-place ops, a head."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.head = head
        setattr(self, head, nn.Linear(64, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return getattr(self, self.head)(self.relu(y).mean(dim=(2, 3)))


def stand_in_for_torchvision() -> None:
    """Put a package with what the tests import into ``sys.modules``, unless the real one is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    parts: dict[str, dict[str, Any]] = {
        "datasets": {"FakeData": FakeData},
        "transforms": {"Compose": compose, "ToTensor": to_tensor, "Normalize": normalize},
        "models": {
            "resnet18": lambda weights=None: ConvNet("fc"),
            "densenet121": lambda weights=None: ConvNet("classifier"),
        },
    }
    package = sys.modules["torchvision"] = ModuleType("torchvision")
    for name, members in parts.items():
        module = sys.modules[f"torchvision.{name}"] = ModuleType(f"torchvision.{name}")
        vars(module).update(members)
        setattr(package, name, module)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions inside an exception group, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


class Suite:
    """The pytest plugin: swaps the engine, fixes the seeds, keeps outcomes and reasons of failure."""

    def __init__(self, engine: type[PrivacyEngine]) -> None:
        self.engine = engine
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            names = vars(item.module) if isinstance(item, pytest.Function) else {}
            if "PrivacyEngine" in names:
                names["PrivacyEngine"] = self.engine

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)
        randomness.system_entropy = itertools.count(FIRST).__next__

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        if call.excinfo is None:
            return
        lines = {f"{type(e).__name__}: {' '.join(str(e).split())[:220]}" for e in leaves(call.excinfo.value)}
        self.reasons.setdefault(node.nodeid, " | ".join(sorted(lines)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        worst = {"failed": 2, "skipped": 1, "passed": 0}
        known = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(known, report.outcome, key=worst.__getitem__)

    def summary(self, on_purpose: dict[str, str], show_known: bool, subset: bool) -> bool:
        """Print the figures and each failure's reason.

        Args:
            on_purpose: Part of a test's id -> why it fails on purpose.
            show_known: Also print the failures that are on purpose.
            subset: Only some tests were selected: an entry that met no test is not stale.

        Returns:
            Whether the failures are exactly the ones on purpose, and something ran.
        """
        ids: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        for test, outcome in self.outcomes.items():
            ids[outcome].append(test)
        why = {test: next((w for k, w in on_purpose.items() if k in test), None) for test in ids["failed"]}
        unexpected = [test for test, reason in why.items() if reason is None]
        named = {key: [test for test in self.outcomes if key in test] for key in on_purpose}
        stale = [key for key, tests in named.items() if not tests and not subset]
        passing = [test for tests in named.values() for test in tests if self.outcomes[test] == "passed"]
        print()
        for test, reason in why.items():
            if reason is None:
                print(f"FAILED {test.rpartition('/')[2]}\n    {self.reasons.get(test, 'no reason recorded')}")
            elif show_known:
                print(f"on purpose {test.rpartition('/')[2]}\n    {reason}\n    {self.reasons.get(test, '')}")
        for key in stale:
            print(f"STALE entry of ON_PURPOSE, it names no test: {key}")
        for test in passing:
            print(f"PASSED, though ON_PURPOSE names it: {test.rpartition('/')[2]}")
        print(", ".join(f"{len(tests)} {outcome}" for outcome, tests in ids.items()), end=" ")
        print(f"({len(why) - len(unexpected)} of the failures on purpose), engine {self.engine.__name__}")
        return bool(ids["passed"]) and not (unexpected or stale or passing)


def main() -> int:
    """Run the suite.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("opacus", "dpfix"), default="dpfix")
    parser.add_argument("--known", action="store_true", help="also list the failures that are on purpose")
    parser.add_argument("--examples", type=int, default=20, help="per Hypothesis test (Opacus takes 100)")
    options, pytest_args = parser.parse_known_args()

    engine: type[PrivacyEngine] = PrivacyEngine
    if options.backend == "dpfix":
        import dpfix

        engine = dpfix.SafePrivacyEngine
    torch.set_num_threads(1)  # the models are small: threads only make the run slower
    stand_in_for_torchvision()
    settings.register_profile("suite", max_examples=options.examples, derandomize=True, database=None)
    settings.load_profile("suite")
    tests = Path(opacus.tests.__path__[0])
    suite = Suite(engine)
    arguments = ["-p", "no:cacheprovider", "-q", "--tb=no", "--no-summary", "-W", "ignore", "-c"]
    arguments += [os.devnull, f"--rootdir={tests}"]
    arguments += [str(tests / f"{name}_test.py") for name in NAMES.split()]
    status = pytest.main(arguments + pytest_args, plugins=[suite])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    on_purpose = ON_PURPOSE if options.backend == "dpfix" else {}
    return 0 if suite.summary(on_purpose, options.known, bool(pytest_args)) else 1


if __name__ == "__main__":
    sys.exit(main())
