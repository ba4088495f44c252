"""Persons as samples: one person moves the released sum by at most the clip norm, however many items she has."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import CacheDataset
from monai.data import Dataset as MonaiDataset
from monai.data.utils import list_data_collate
from monai.transforms import Compose, EnsureTyped, RandSpatialCropSamplesd
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

import dpfix
from dpfix import AugmentationMultiplicity
from tests.helpers import generators_unchanged, sgd
from tests.reference import Gradients, clipped_sum, norm, relative_error
from tests.sampling.models import MODELS, OWN, convolutional, hooked, released, step

OWNERS = ["f", "b", "d", "b", "c", "d", "e", "d", "a", "b", "c", "d", "f"]
"""To whom every item belongs: persons with 1, 3, 2, 4, 1 and 2 items, mixed up."""
PERSONS = sorted(set(OWNERS))


def data_of(shape: tuple[int, ...], items: int = len(OWNERS)) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(items, *shape, generator=draw, dtype=torch.float64)
    return TensorDataset(images, torch.arange(items) % 3)


def by_person(model: nn.Module, data: Dataset[Any], owners: Sequence[Any], reduction: str = "mean") -> list[Gradients]:
    """The mean over every person's items of the gradient of each item alone, by ordinary autograd."""
    parameters = dict(model.named_parameters())
    found = []
    for person in dict.fromkeys(owners):
        mine = []
        for index in (i for i, owner in enumerate(owners) if owner == person):
            x, y = data[index]
            loss = F.cross_entropy(model(x[None]), y[None], reduction=reduction)
            mine.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
        means = [sum(torch.zeros_like(p) if g is None else g for g in of_it) / len(mine)
                 for p, of_it in zip(parameters.values(), zip(*mine, strict=True), strict=True)]  # fmt: skip
        found.append(dict(zip(parameters, means, strict=True)))
    return found


def all_at_once(data: Dataset[Any], owners: Sequence[Any], **changes: Any) -> dict[str, Any]:
    """Arguments under which every draw holds every person."""
    return {
        "data_loader": DataLoader(data, batch_size=len(set(owners))),
        "privacy_unit": owners,
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "criterion": F.cross_entropy,
        "cache": False,
        **changes,
    }


def one_release(training: Any, model: nn.Module, reduction: str = "mean") -> Gradients:
    """What one pass of one draw releases, without noise."""
    private, optimizer, loader = training
    batches = list(loader)
    assert len(batches) == 1
    optimizer.zero_grad()
    step(private, batches[0], reduction).backward()
    optimizer.pre_step()
    return {n: g.clone() for n, g in released(model, optimizer, reduction).items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("engine", ["auto", *OWN])
@pytest.mark.parametrize("name", ["convolution", "transformer", "unet"])
def test_one_person_moves_the_sum_by_at_most_the_clip_norm(name: str, engine: str, reduction: str) -> None:
    """With and without each person, against items one by one; persons have 1 to 4 items."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, data = build().double(), data_of(shape)
    plain = copy.deepcopy(model)
    wanted = dict(zip(dict.fromkeys(OWNERS), by_person(plain, data, OWNERS), strict=True))
    clip_norm = 0.5 * min(norm(g) for g in wanted.values())  # all are clipped
    options = {"max_grad_norm": clip_norm, "grad_sample_mode": engine, "loss_reduction": reduction,
               "criterion": nn.CrossEntropyLoss(reduction=reduction)}  # fmt: skip

    def release(owners: list[str]) -> Gradients:
        indices = [i for i, owner in enumerate(OWNERS) if owner in owners]
        training = dpfix.make_private_safe(
            module=model, optimizer=sgd(model, 0.0),
            **all_at_once(Subset(data, indices), [OWNERS[i] for i in indices], **options),
        )  # fmt: skip
        assert training[1].expected_batch_size == len(owners)
        found = one_release(training, model, reduction)
        assert relative_error(found, clipped_sum([wanted[o] for o in owners], clip_norm)) < 1e-9
        training[0].cleanup()
        return found

    whole = release(PERSONS)
    for person in ("d", "a") if engine == "auto" else ("d",):
        without = release([other for other in PERSONS if other != person])
        moved = norm({n: g - without[n] for n, g in whole.items()})
        assert 0.99 * clip_norm < moved <= clip_norm * (1 + 1e-3)


@pytest.mark.parametrize("engine", [*OWN, "hooks", "functorch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_persons_with_equally_many_items(engine: str, reduction: str) -> None:
    torch.manual_seed(0)
    model, owners = hooked().double(), [0, 1, 2, 3] * 3
    data, plain = data_of((2, 8, 8), 12), copy.deepcopy(model)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0),
        **all_at_once(data, owners, grad_sample_mode=engine, loss_reduction=reduction, max_grad_norm=0.3,
                      criterion=nn.CrossEntropyLoss(reduction=reduction)),
    )  # fmt: skip
    found = one_release(training, model, reduction)
    assert relative_error(found, clipped_sum(by_person(plain, data, owners), 0.3)) < 1e-9


def trained(model: nn.Module, data: Any, steps: int = 12, batch_size: int = 2, **changes: Any) -> Any:
    """A real loop, with the persons of every batch noted in ``training.seen``."""
    given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "criterion": nn.CrossEntropyLoss(), "cache": False}
    loader_options = changes.pop("loader", {})
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.05), data_loader=DataLoader(data, batch_size=batch_size, **loader_options),
        **given | changes,
    )  # fmt: skip
    private, optimizer, loader = training
    training.rows = []
    while len(training.rows) < steps:
        for x, y in loader:
            training.rows.append(len(x) if loader.ledger.pending() else 0)
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
    return training


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampling", ["poisson", "truncated", "shuffle"])
def test_a_real_loop_speaks_of_persons(sampling: str, workers: int, recwarn: pytest.WarningsRecorder) -> None:
    model = convolutional().double()
    training = trained(
        model, data_of((2, 8, 8)), privacy_unit=OWNERS, sampling=sampling, loader={"num_workers": workers}
    )
    loader = training[2]
    assert len(loader.dataset) == 6 and loader.sample_rate == 2 / 6 and len(loader) == 3
    assert training[1].expected_batch_size == 2
    assert len(set(training.rows)) > 2
    assert sampling == "shuffle" or 0 in trained(model, data_of((2, 8, 8)), 40, 1, privacy_unit=OWNERS).rows
    statement = training.statement(1e-3)
    assert statement.samples == 6 and "persons:           6" in str(statement) and "one person" in statement.adjacency
    assert statement.sampling_rate == (1.0 if sampling == "shuffle" else 2 / 6)
    assert training.report.settings["persons"].startswith("6 (13 items, 1 to 4 each)")
    assert training.report.settings["expected batch size"] == "2 persons"
    with pytest.warns(dpfix.DPFixWarning, match="number of persons = 0.17"):
        training.get_epsilon(0.2)
    assert not [w for w in recwarn if issubclass(w.category, dpfix.DPFixWarning) and "persons" not in str(w.message)]


def test_epsilon_is_that_of_a_data_set_of_persons() -> None:
    model = convolutional().double()
    people = trained(model, data_of((2, 8, 8)), 6, privacy_unit=OWNERS, seed=0)
    other = convolutional().double()
    items = trained(other, data_of((2, 8, 8), 6), 6, seed=0)
    assert people.get_epsilon(1e-3) == items.get_epsilon(1e-3)
    model, other = convolutional(), convolutional()
    noise = [
        dpfix.make_private_safe_with_epsilon(
            module=m, optimizer=sgd(m), target_epsilon=3.0, target_delta=1e-3, epochs=4, max_grad_norm=1.0,
            criterion=nn.CrossEntropyLoss(), data_loader=DataLoader(TensorDataset(*(t.float() if t.is_floating_point() else t
            for t in d.tensors)), batch_size=2), **unit,
        )[1].noise_multiplier
        for m, d, unit in ((model, data_of((2, 8, 8)), {"privacy_unit": OWNERS}), (other, data_of((2, 8, 8), 6), {}))
    ]  # fmt: skip
    assert noise[0] == noise[1]


@pytest.mark.parametrize("physical", [1, 2, 3, 6])
@pytest.mark.parametrize("engine", OWN)
def test_a_memory_manager_splits_by_persons(engine: str, physical: int) -> None:
    torch.manual_seed(0)
    model, data = convolutional().double(), data_of((2, 8, 8))
    plain = copy.deepcopy(model)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 1.0), **all_at_once(data, OWNERS, max_grad_norm=0.3, grad_sample_mode=engine)
    )
    private, optimizer, loader = training
    batches = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as small:
        for batch in small:
            batches.append(len(batch[0]))
            optimizer.zero_grad()
            step(private, batch).backward()
            optimizer.step()
    assert len(batches) == 6 // physical and sum(batches) == 13
    wanted = clipped_sum(by_person(plain, data, OWNERS), 0.3)
    moved = {n: (p - dict(model.named_parameters())[n]).detach() * 6 for n, p in plain.named_parameters()}
    assert relative_error(moved, wanted) < 1e-9


def test_some_items_of_a_person_are_drawn_anew_for_every_batch() -> None:
    torch.manual_seed(0)
    owners = [i % 4 for i in range(36)] + [4]
    data = TensorDataset(torch.arange(37.0)[:, None], torch.arange(37) % 2)
    model = nn.Linear(1, 2)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), **all_at_once(data, owners, noise_multiplier=1.0, items_per_unit=3)
    )
    private, optimizer, loader = training
    seen: dict[int, set[tuple[int, ...]]] = {person: set() for person in range(5)}
    for _ in range(8):
        for x, y in loader:
            items = x.flatten().int().tolist()
            assert len(items) == 13
            for person in range(5):
                seen[person].add(tuple(sorted(i for i in items if owners[i] == person)))
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
    assert all(len(items) == 3 for person in range(4) for items in seen[person])
    assert all(len(seen[person]) > 4 for person in range(4)) and seen[4] == {(36,)}


def test_views_of_the_items_of_a_person_are_averaged_too() -> None:
    torch.manual_seed(0)
    model, data = convolutional().double(), data_of((2, 8, 8))
    plain = copy.deepcopy(model)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0),
        **all_at_once(data, OWNERS, max_grad_norm=0.3,
                      augmentation=AugmentationMultiplicity(lambda x: x.flip(-1), k=2, identity=True)),
    )  # fmt: skip
    x, y = data.tensors
    both = TensorDataset(torch.cat([x, x.flip(-1)]), torch.cat([y, y]))
    wanted = clipped_sum(by_person(plain, both, [*OWNERS, *OWNERS]), 0.3)
    assert relative_error(one_release(training, model), wanted) < 1e-9


# ------------------------------------------------------------------ ways to say who an item belongs to


class Cases(Dataset[Any]):
    """Dictionaries, which count how often they are read."""

    def __init__(self, owners: Sequence[Any] = OWNERS, key: str = "patient_id") -> None:
        x, y = data_of((2, 8, 8), len(owners)).tensors
        self.items = [{"image": x[i].float(), "label": y[i], key: owner} for i, owner in enumerate(owners)]
        self.read = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return self.items[index]


class Table:
    """Stands in for ``datasets.Dataset``: columns, and items that are costly."""

    def __init__(self) -> None:
        x, y = data_of((2, 8, 8)).tensors
        self.columns = {"image": list(x.float()), "label": list(y), "patient_id": list(OWNERS)}
        self.column_names, self.read = list(self.columns), 0

    def with_format(self, kind: Any) -> Table:
        return self

    def __len__(self) -> int:
        return len(OWNERS)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        self.read += 1
        return {name: column[key] for name, column in self.columns.items()}

    def __getitems__(self, keys: list[int]) -> list[Any]:
        return [self[key] for key in keys]


def on_cases(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def people(data: Any, unit: Any, **changes: Any) -> Any:
    model = convolutional()
    options = changes.pop("loader", {})
    return dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=DataLoader(data, batch_size=3, **options), noise_multiplier=1.0,
        max_grad_norm=1.0, training_step=on_cases, privacy_unit=unit, cache=False, **changes,
    )  # fmt: skip


def members(training: Any) -> list[set[int]]:
    found = training[2].dataset
    return sorted((set(found.items_of(person).tolist()) for person in range(len(found))), key=min)


BY_OWNER = sorted(({i for i, o in enumerate(OWNERS) if o == person} for person in PERSONS), key=min)


@pytest.mark.parametrize(
    "unit",
    [
        "patient_id",
        lambda item: item["patient_id"],
        lambda i: OWNERS[i],
        lambda index: OWNERS[index],
        OWNERS,
        tuple(OWNERS),
        torch.tensor([ord(o) for o in OWNERS]),
        torch.tensor([ord(o) for o in OWNERS]).numpy(),
    ],
)  # fmt: skip
def test_ways_to_name_persons(unit: Any) -> None:
    training = people(Cases(), unit)
    assert members(training) == BY_OWNER
    assert training[2].dataset.dataset.items


def loop(training: Any, passes: int = 2) -> int:
    model, optimizer, loader = training
    steps = 0
    for _ in range(passes):
        for batch in loader:
            optimizer.zero_grad()
            on_cases(model, batch).backward()
            optimizer.step()
            steps += 1
    return steps


@pytest.mark.parametrize("kind", ["MONAI", "cache", "subset", "concatenated", "table", "subset of a table"])
def test_columns_are_read_without_making_items(kind: str) -> None:
    made: list[int] = []

    def note(item: Any) -> Any:
        made.append(1)
        return item

    raw = Cases().items
    table = Table()
    dataset: Any = {
        "MONAI": lambda: MonaiDataset(raw, note),
        "cache": lambda: CacheDataset(raw, Compose([note]), progress=False),
        "subset": lambda: Subset(MonaiDataset(raw, note), list(range(12, -1, -1))),
        "concatenated": lambda: ConcatDataset([MonaiDataset(raw[:5], note), MonaiDataset(raw[5:], note)]),
        "table": lambda: table,
        "subset of a table": lambda: Subset(table, list(range(13))),  # type: ignore[arg-type]
    }[kind]()
    made.clear()
    from dpfix.sampling.unit_names import names_of

    names = names_of(dataset, list(range(13)), "patient_id").of_items
    assert names == (OWNERS[::-1] if kind == "subset" else OWNERS)
    assert not made and not table.read
    training = people(dataset, "patient_id")
    assert loop(training) == 4


def test_items_that_are_crops_of_a_volume() -> None:
    transform = Compose([
        EnsureTyped(keys=["image"]), RandSpatialCropSamplesd(keys=["image"], roi_size=(8, 8), num_samples=2, random_size=False)
    ])  # fmt: skip
    training = people(MonaiDataset(Cases().items, transform), "patient_id", loader={"collate_fn": list_data_collate})
    rows = []
    for batch in training[2]:
        rows.append((len(batch["image"]), list(training[2].ledger.counts)))
        training[1].zero_grad()
        on_cases(training[0], batch).backward()
        training[1].step()
    assert all(n == sum(counts) and all(c % 2 == 0 for c in counts) for n, counts in rows)


def test_only_the_indices_of_the_sampler_are_drawn() -> None:
    training = people(Cases(), OWNERS, loader={"sampler": SubsetRandomSampler([0, 2, 5, 7, 12])})
    assert members(training) == [{0, 12}, {2, 5, 7}]


def test_a_loader_of_an_earlier_call_goes_on_with_its_persons() -> None:
    data = Cases()
    first = people(data, "patient_id")
    given: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "training_step": on_cases, "cache": False}
    for unit in ({}, {"privacy_unit": "patient_id"}):
        model = convolutional()
        again = dpfix.make_private_safe(module=model, optimizer=sgd(model), data_loader=first[2], **given, **unit)
        assert members(again) == BY_OWNER and again.statement(1e-3).counted == "persons"
        loop(again)
    model = convolutional()
    with pytest.raises(dpfix.LoaderError, match=r"draws 6 persons, 13 items, 1 to 4 each; .* name 13 persons"):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model), data_loader=first[2], **given, privacy_unit=list(range(13))
        )
    items = people(data, None)
    with pytest.raises(dpfix.LoaderError, match=r"draws Poisson batches already.*the script's own loader"):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model), data_loader=items[2], **given, privacy_unit="patient_id"
        )


def test_copies_of_a_record_are_one_person_s() -> None:
    data = Cases()
    twice = ConcatDataset([data, data])
    with pytest.raises(dpfix.LoaderError, match=r"(?s)several times.*privacy_unit="):
        people(twice, None)
    training = people(twice, "patient_id")
    assert [len(items) for items in members(training)] == [2 * len(items) for items in BY_OWNER]
    loop(training)


def test_diagnose_speaks_of_persons() -> None:
    model = convolutional()
    report = dpfix.diagnose(
        module=model, optimizer=sgd(model), data_loader=DataLoader(Cases(), batch_size=3), training_step=on_cases,
        privacy_unit="patient_id", items_per_unit=2,
    )  # fmt: skip
    assert report.settings["items of a person in a batch"].startswith("at most 2, drawn at random")


# ------------------------------------------------------------------ refusals


class Renaming(Cases):
    """Exchanges its items between epochs."""

    def __getitem__(self, index: int) -> Any:
        return self.items[(index + self.shift) % len(self.items)]

    shift = 0


class Random(Cases):
    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return {**self.items[index], "patient_id": self.read}


NAN = float("nan")


@pytest.mark.parametrize(
    ("data", "unit", "words"),
    [
        (Cases(), "patient", r"privacy_unit='patient': item 0 is dict with the keys image, label, patient_id"),
        (data_of((2, 8, 8)), "patient", r"item 0 is tuple and no mapping"),
        (Cases(), OWNERS[:-1], r"has 12 names, and Cases has 13 items"),
        (Subset(Cases(), [1, 2, 3]), OWNERS, r"13 names, and Subset has 3 items.*names\[i\] for i in subset.indices"),
        (Cases([*OWNERS[:4], None, None, *OWNERS[6:]]), "patient_id", r"2 of 13 items have no name.*index 4: None"),
        (Cases(), [*OWNERS[:3], NAN, *OWNERS[4:]], r"1 of 13 items.*index 3: nan"),
        (Cases(), torch.tensor([NAN, *range(12)]), r"1 of 13 items.*index 0: nan"),
        (Cases(), [[o] for o in OWNERS], r"13 of 13 items.*a list, which has no hash"),
        (Cases(), [" ", *OWNERS[1:]], r"index 0: ' '"),
        (Cases(), [torch.zeros(2)] * 13, r"a Tensor of shape \(2,\)"),
        (Cases(), [object() for _ in OWNERS], r"object, of which no two are equal"),
        (Cases(), ["b ", *OWNERS[1:]], r"names persons 'b ' and 'b'.*read alike"),
        (Cases(), ["Jos\u00e9", "Jose\u0301", *OWNERS[2:]], r"names persons .*read alike"),
        (Cases(), [1, "1", *OWNERS[2:]], r"names persons 1 and '1'"),
        (Cases(), 3, r"privacy_unit is int"),
        (Cases(), set(OWNERS), r"privacy_unit is set"),
        (Cases(), dict(enumerate(OWNERS)), r"privacy_unit is dict"),
        (Cases(), lambda i: i["patient_id"], r"failed for index 0.*called with the index"),
        (Cases(), lambda item: item // 5, r"failed for index 0.*called with the item, a dict"),
        (Cases(), lambda item: None, r"13 of 13 items have no name"),
        (Random(), "patient_id", r"the item of index 0 belonged to 1, and belongs to 14 now"),
        (ConcatDataset([Cases()] * 1 + [Cases()]), list(range(25)), r"25 names, and ConcatDataset has 26 items"),
        (Subset(Cases(), [0, 1, 0]), ["p", "q", "r"], r"indices 0 and 2 stand for one record, .*'p' by the one and to 'r'"),
    ],
)  # fmt: skip
def test_units_that_do_not_name_persons_are_refused(data: Any, unit: Any, words: str) -> None:
    model = convolutional()
    optimizer, loader = sgd(model), DataLoader(data, batch_size=3)
    before, attributes = {n: p.clone() for n, p in model.state_dict().items()}, dict(vars(loader))
    with generators_unchanged(), pytest.raises(dpfix.ArgumentError, match=words) as refusal:
        dpfix.make_private_safe(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            training_step=on_cases, privacy_unit=unit,
        )  # fmt: skip
    assert refusal.value.findings[0].path == "privacy_unit"
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert vars(loader) == attributes and type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"items_per_unit": 5}, r"items_per_unit=5, and nobody has more than 4 items \(6 persons, 13 items, 1 to 4 each\)"),
        ({"items_per_unit": 0}, r"items_per_unit=0 is not a whole number"),
        ({"items_per_unit": 1.5}, r"items_per_unit=1.5 is not"),
        ({"items_per_unit": True}, r"items_per_unit=True is not"),
        ({"items_per_unit": 2, "privacy_unit": None}, r"items_per_unit=2 without privacy_unit"),
        ({"sampling": "fixed"}, r"privacy_unit with sampling='fixed'"),
        ({"poisson_sampling": False}, r"privacy_unit with sampling='fixed'"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    for call in (dpfix.make_private_safe, dpfix.diagnose, dpfix.make_private_safe_with_epsilon):
        model = convolutional()
        given: dict[str, Any] = {"privacy_unit": OWNERS, **changes}
        if call is dpfix.make_private_safe_with_epsilon:
            given |= {"target_epsilon": 1.0, "target_delta": 1e-3, "epochs": 1, "max_grad_norm": 1.0}
        elif call is dpfix.make_private_safe:
            given |= {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        with pytest.raises(dpfix.ArgumentError, match=words):
            call(
                module=model, optimizer=sgd(model), data_loader=DataLoader(Cases(), batch_size=3), training_step=on_cases,
                **given,
            )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("unit", ["patient_id", lambda item: item["patient_id"]])
def test_an_item_that_changes_hands_is_refused(unit: Any, workers: int) -> None:
    data = Renaming()
    training = people(data, unit, loader={"num_workers": workers})
    loop(training, 1)
    data.shift = 1
    with pytest.raises(dpfix.ArgumentError, match=r"the item of index \d+ belonged to '\w', and belongs to '\w' now"):
        loop(training, 9)


class WithoutNames(Renaming):
    """The items say nothing about whose they are."""

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        image = item["image"] + (0.1 * torch.randn(2, 8, 8) if self.noisy else 0.0)
        return {"image": image, "label": item["label"]}

    noisy = False


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("unit", [OWNERS, lambda index: OWNERS[index]])
def test_an_item_without_a_name_that_changes_hands_is_refused(unit: Any, workers: int) -> None:
    data = WithoutNames()
    training = people(data, unit, loader={"num_workers": workers})
    loop(training, 2)
    data.shift = 1
    words = (
        r"the item of index \d+, which belongs to '\w', is now the one that index \d+ had before, which belongs to '\w'"
    )
    with pytest.raises(dpfix.ArgumentError, match=words):
        loop(training, 60)


def test_an_item_that_changes_hands_within_a_person_is_not_refused() -> None:
    data = WithoutNames()
    training = people(data, ["a"] * 6 + ["b"] * 7)
    loop(training, 2)
    data.items[:6], data.items[6:] = data.items[:6][::-1], data.items[6:][::-1]
    loop(training, 40)


@pytest.mark.parametrize("kind", ["noisy", "copies", "zeros", "whole numbers"])
def test_items_that_are_alike_or_change_by_chance_are_not_refused(kind: str) -> None:
    data = WithoutNames()
    data.noisy = kind == "noisy"
    for i, item in enumerate(data.items):
        if kind == "copies":
            item["image"] = data.items[i % 2]["image"]
        elif kind == "zeros":
            item["image"] = torch.zeros(2, 8, 8)
        elif kind == "whole numbers":
            item["image"] = torch.full((2, 8, 8), float(i % 3))
    training = people(data, OWNERS)
    loop(training, 40)


def test_loaders_without_persons_are_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Cases().items)

    buckets = [[0, 1, 2], [3, 4, 5, 6]]
    for loader in (DataLoader(Stream(), batch_size=3), DataLoader(Cases(), batch_sampler=buckets)):
        model = convolutional()
        with pytest.raises(dpfix.LoaderError, match=r"a stream has no set|batch_sampler of its own"):
            dpfix.make_private_safe(
                module=model, optimizer=sgd(model), data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
                training_step=on_cases, privacy_unit="patient_id",
            )  # fmt: skip


# ------------------------------------------------------------------ one epsilon speaks of one unit


@pytest.mark.parametrize("shared", ["model", "engine"])
@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (None, OWNERS, r"accounted for each item of a person alone, and this call accounts for persons"),
        (list(range(13)), OWNERS, r"accounted for each item of a person alone"),
        (OWNERS, None, r"were accounted for persons, and this call accounts for each item alone"),
        (OWNERS, OWNERS[::-1], r"accounted for each item of a person alone"),
        (OWNERS, OWNERS, None),
        (OWNERS, [o in "ab" for o in OWNERS], r"accounted for each item of a person alone"),
    ],
    ids=["items, persons", "listed items, persons", "persons, items", "other persons", "the same", "groups of persons"],
)  # fmt: skip
def test_steps_of_another_unit_are_not_added_up(shared: str, first: Any, then: Any, words: str | None) -> None:
    data, model = Cases(), convolutional()
    before = people(data, first)
    if shared == "model":
        model = before[0]
    loop(before)
    given: dict[str, Any] = {
        "module": model, "optimizer": sgd(model), "data_loader": DataLoader(data, batch_size=3), "noise_multiplier": 1.0,
        "max_grad_norm": 1.0, "training_step": on_cases, "privacy_unit": then, "cache": False,
    }  # fmt: skip
    if shared == "engine":
        given["privacy_engine"] = before.privacy_engine
    if words is None or (shared == "model" and then is None):  # what persons lose bounds what their items lose
        dpfix.make_private_safe(**given)
        return
    with pytest.raises(dpfix.ArgumentError, match=words):
        dpfix.make_private_safe(**given)
    budget = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 1}
    del given["noise_multiplier"]
    with pytest.raises(dpfix.ArgumentError, match=words):
        dpfix.make_private_safe_with_epsilon(**given, **budget)


# ------------------------------------------------------------------ data sets that show their persons


class Files(Cases):
    """Items of files with names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(list(range(len(names))), key="number")
        self.files = names


BIDS = [f"/data/sub-{i // 2:02}/anat/sub-{i // 2:02}_ses-{i % 2}_T1w.nii.gz" for i in range(13)]
ALONE = [f"/data/sub-{i:02}/anat/sub-{i:02}_T1w.nii.gz" for i in range(13)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Cases(), r"have a key 'patient_id', which may name the same person several times"),
        (Cases(key="PatientID"), r"a key 'PatientID'"),
        (Cases(key="user"), r"a key 'user'"),
        (MonaiDataset(Cases(key="subject").items), r"'subject' that names 6 persons for 13 items, one of them 4 times"),
        (Subset(MonaiDataset(Cases(key="case").items), [1, 3, 5]), r"'case' that names 2 persons for 3 items"),
        (Table(), r"Table has a column 'patient_id' that names 6 persons"),
        (Files(BIDS), r"the files of Files are those of 7 persons \(sub-00, ...\) for 13 items, 2 of one"),
        (Subset(Files(BIDS), [0, 1, 4]), r"those of 2 persons"),
        (MonaiDataset([{**c, "scan": f} for c, f in zip(Cases(key="n").items, BIDS, strict=True)]), r"of 7 persons"),
        (Cases(BIDS, key="scan"), r"names a file of 'sub-\d\d', who may have several"),
    ],
)  # fmt: skip
def test_a_data_set_that_shows_its_persons_is_told(data: Any, words: str, recwarn: pytest.WarningsRecorder) -> None:
    findings = [f for f in people(data, None).report.findings if f.code == "DPF050"]
    assert len(findings) == 1
    assert re.search(words, findings[0].fact)
    assert "pass privacy_unit=" in findings[0].help
    assert not [w for w in recwarn if issubclass(w.category, dpfix.DPFixWarning)]


@pytest.mark.parametrize(
    "data",
    [
        Cases(key="name"), Cases(key="lowercase"), Cases(key="users_online_at"), Files(ALONE), Subset(Files(BIDS), [0, 2, 4]),
        MonaiDataset(Cases(list(range(13))).items), Subset(MonaiDataset(Cases().items), [0, 1, 2]),
        Files([f"/data/substance-{i // 2}.png" for i in range(13)]),
    ],
)  # fmt: skip
def test_other_data_sets_are_not(data: Any) -> None:
    assert not [f for f in people(data, None).report.findings if f.code == "DPF050"]


def test_nothing_is_told_where_persons_are_named() -> None:
    assert not [f for f in people(Cases(), "patient_id").report.findings if f.code == "DPF050"]


# ------------------------------------------------------------------ a training by persons goes on from a checkpoint


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_training_goes_on_in_the_middle_of_a_pass(at: int, workers: int, tmp_path: Path) -> None:
    """To the last bit, with some items of every person drawn anew for every batch."""

    def begin() -> tuple[nn.Module, Any]:
        torch.manual_seed(5)
        model = convolutional().double()
        return model, dpfix.make_private_safe(
            module=model, optimizer=sgd(model, 0.05), criterion=nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(data_of((2, 8, 8)), batch_size=2, num_workers=workers), privacy_unit=OWNERS,
            items_per_unit=2, seed=3, cache=False, grad_sample_mode="bookkeeping",
        )  # fmt: skip

    def go(training: Any, passes: int, save_at: int = 0) -> None:
        done = 0
        for _ in range(passes):
            for batch in training[2]:
                training[1].zero_grad()
                step(training[0], batch).backward()
                training[1].step()
                done += 1
                if done == save_at:
                    training.privacy_engine.save_checkpoint(path=tmp_path / "file", **objects(training))

    def objects(training: Any) -> dict[str, Any]:
        return {"module": training[0], "optimizer": training[1], "data_loader": training[2]}

    whole, training = begin()
    go(training, 3, at)
    model, resumed = begin()
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "file", **objects(resumed))
    go(resumed, 3 - at // 3)
    assert all(map(torch.equal, whole.parameters(), model.parameters()))
    assert resumed.statement(1e-3).epsilon == training.statement(1e-3).epsilon
    model = convolutional().double()
    items = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.05), criterion=nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data_of((2, 8, 8)), batch_size=2), seed=3, cache=False, grad_sample_mode="bookkeeping",
    )  # fmt: skip
    with pytest.raises(dpfix.CheckpointError, match="whether a sample is a person was True there"):
        items.privacy_engine.load_checkpoint(path=tmp_path / "file", **objects(items))


NUMBERED = [ord(o) - ord("a") for o in OWNERS]
BY_HALVES = [OWNERS[i % 5] for i in range(13)]


def saved_and_loaded(how: str, first: Any, then: Any, order: Sequence[int], path: Path) -> Any:
    """Train by some units, save, and load what was saved into a training by others, on the data set in another order."""
    data, again = Cases(), Cases()
    before = people(data, first)
    loop(before)
    again.items = [again.items[i] for i in order]
    training = people(again, then)
    if how == "checkpoint":
        given = [{"module": t[0], "optimizer": t[1], "data_loader": t[2]} for t in (before, training)]
        before.privacy_engine.save_checkpoint(path=path, **given[0])
        training.privacy_engine.load_checkpoint(path=path, **given[1])
    elif how == "state":
        training[1].load_state_dict(before[1].state_dict())
    else:
        model = convolutional()
        optimizer = sgd(model)
        optimizer.load_state_dict(before[1].state_dict())
        training = dpfix.make_private_safe(
            module=model, optimizer=optimizer, data_loader=DataLoader(again, batch_size=3), noise_multiplier=1.0,
            max_grad_norm=1.0, training_step=on_cases, privacy_unit=then, cache=False,
        )  # fmt: skip
    return training


ways = pytest.mark.parametrize("how", ["checkpoint", "state", "state before the call"])


@ways
@pytest.mark.parametrize(
    ("first", "then"),
    [(OWNERS, ["x" + o for o in OWNERS[::-1]]), (OWNERS, BY_HALVES), (NUMBERED, NUMBERED[::-1]), (None, OWNERS)],
    ids=["others", "coarser", "numbers", "items"],
)
def test_a_saved_training_of_other_units_is_not_gone_on_with(how: str, first: Any, then: Any, tmp_path: Path) -> None:
    words = (
        r"accounted for other units when they were saved, and this call accounts for persons|training is another one"
    )
    with pytest.raises((dpfix.CheckpointError, dpfix.ArgumentError), match=words):
        saved_and_loaded(how, first, then, range(13), tmp_path / "file")


@ways
@pytest.mark.parametrize("kind", ["the same", "a data set in another order", "numbers", "items go on from persons"])
def test_a_saved_training_of_the_same_units_goes_on(how: str, kind: str, tmp_path: Path) -> None:
    if kind == "items go on from persons" and how == "checkpoint":
        return  # another plan
    order = range(12, -1, -1) if kind == "a data set in another order" else range(13)
    first, then = {"the same": (OWNERS, OWNERS), "numbers": (NUMBERED, NUMBERED)}.get(
        kind, ("patient_id", "patient_id")
    )
    training = saved_and_loaded(how, first, None if kind.startswith("items") else then, order, tmp_path / "file")
    assert training.statement(1e-3).steps == 4
    loop(training, 1)


def test_a_state_that_does_not_say_for_whom_it_was_accounted_is_loaded() -> None:
    before, training = people(Cases(), OWNERS), people(Cases(), OWNERS)
    loop(before)
    state = before[1].state_dict()
    del state["param_groups"][0]["dpfix"]["units"]
    training[1].load_state_dict(state)
    assert training.statement(1e-3).steps == 4


# ------------------------------------------------------------------ what could tear the items of a person apart


class Texts(Dataset[Any]):
    """Texts of one length, but for a few at the end."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        draw = torch.Generator().manual_seed(index)
        length = 5 if index < 56 else 3
        return torch.randint(1, 50, (length,), generator=draw), torch.tensor(index % 3)


def padded(items: list[Any]) -> Any:
    return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])


def longest_first(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: -len(item[0])))


def backwards(items: list[Any]) -> Any:
    return padded(items[::-1])


def masked_at_random(items: list[Any]) -> Any:
    x, y = padded(items)
    return x.masked_fill((torch.rand(x.shape) < 0.2) & (x != 0), 1), y


def without_short_ones(items: list[Any]) -> Any:
    return padded([item for item in items if len(item[0]) > 4] or items)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).sum(1))


UNEQUAL = [i % 10 if i < 20 else 10 + i % 4 for i in range(60)]
EQUAL = [i % 12 for i in range(60)]


@pytest.mark.parametrize("owners", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("collate", "error"),
    [
        (padded, None),
        (masked_at_random, None),
        (longest_first, r"DPF049.*longest_first, test_people.py:\d+\) puts the items of a batch into an order of its own"),
        (backwards, r"DPF049.*backwards"),
        (without_short_ones, r"have 5, 5, 5, 5 items, and enter Words as 5, 5, 4, 5 rows|have 2, 2, 2, 10 items.* 2, 2, 2, 9"),
    ],
)  # fmt: skip
def test_a_collate_function_that_tears_persons_apart_is_refused(collate: Any, error: str | None, owners: Any) -> None:
    torch.manual_seed(0)
    model = Words()

    def run() -> None:
        private, optimizer, loader = dpfix.make_private_safe(
            module=model, optimizer=sgd(model), criterion=nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(Texts(), batch_size=4, collate_fn=collate), privacy_unit=owners, cache=False, seed=1,
        )  # fmt: skip
        for _ in range(6):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(private(x), y).backward()
                optimizer.step()

    if error is None:
        run()
        return
    with pytest.raises(dpfix.DPFixError, match=error):
        run()


@pytest.mark.parametrize("owners", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_an_item_that_is_left_out_later_is_refused(owners: Any) -> None:
    """One row less, and those behind it would be taken for another's."""
    left_out: list[int] = []

    def collate(items: list[Any]) -> Any:
        return padded([item for item in items if not left_out or int(item[0][0]) % 5])

    torch.manual_seed(0)
    model = Words()
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), criterion=nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(Texts(), batch_size=8, collate_fn=collate), privacy_unit=owners, cache=False, seed=1,
    )  # fmt: skip
    left_out.append(1)
    before = [p.clone() for p in model.parameters()]
    words = (
        r"rows, which are not 5 for each sample|the rows of the inputs of Words are not|is not the mean of the losses"
    )
    with pytest.raises(dpfix.DPFixError, match=words):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


# ------------------------------------------------------------------ what the loop does is followed


def plainly(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def centred(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x - x.mean(0)), y)


def centred_outputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out - out.mean(0), y)


def shuffled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    return F.cross_entropy(model(x[order]), y[order])


def mixed_up(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(0.6 * x + 0.4 * x.roll(1, 0)), y)


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def twice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(torch.cat([x, x.flip(-1)])), torch.cat([y, y]))


@pytest.mark.parametrize("owners", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (plainly, None),
        (centred, "DPF041.*mixes the samples"),
        (centred_outputs, "DPF014"),
        (shuffled, "DPF041"),
        (mixed_up, "DPF041"),
        (summed, "DPF015.*is a sum over the samples"),
        (twice, "per-sample gradients of|rows of the inputs of Sequential are not those"),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["criterion", "nothing told"])
def test_the_loop_is_followed_on_real_steps(told: bool, loss: Any, error: str | None, owners: Any) -> None:
    torch.manual_seed(0)
    model, data = convolutional(), data_of((2, 8, 8), 60)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, privacy_unit=owners, cache=False, seed=3,
        data_loader=DataLoader(TensorDataset(data.tensors[0].float(), data.tensors[1]), batch_size=4), strict=True,
        **({"criterion": nn.CrossEntropyLoss()} if told else {}),
    )  # fmt: skip

    def run(passes: int) -> None:
        for _ in range(passes):
            for x, y in loader:
                optimizer.zero_grad()
                loss(private, x, y).backward()
                optimizer.step()

    if error is None:
        run(6)
        return
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(dpfix.DPFixError, match=error):
        run(1)
    assert loss is summed or all(map(torch.equal, before, model.parameters()))  # which shows with several samples only


@pytest.mark.parametrize("owners", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_wrong_sum_over_persons_is_seen(owners: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's norms and sum are compared with those of ordinary autograd on the very batch."""
    torch.manual_seed(0)
    model, data = convolutional(), data_of((2, 8, 8), 60)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, privacy_unit=owners, cache=False, seed=3,
        data_loader=DataLoader(TensorDataset(data.tensors[0].float(), data.tensors[1]), batch_size=4),
        criterion=nn.CrossEntropyLoss(), grad_sample_mode="bookkeeping",
    )  # fmt: skip
    handle = optimizer.guard.guarded.handle
    monkeypatch.setattr(handle, "plan", Wrong(handle.plan))
    with pytest.raises(dpfix.PlanBrokenError, match="computes another sum for this batch"):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()


class Wrong:
    """A plan that weighs the first sample double."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def scale(self, samples: int, counts: tuple[int, ...] = ()) -> Tensor:
        right = torch.as_tensor(self._plan.scale(samples, counts), dtype=torch.float64)
        return right.expand(samples) * torch.tensor([2.0] + [1.0] * (samples - 1))
