"""What one batch does not tell about the loop's call of the model, the first real call decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dpfix
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one
from tests.training.steps import values

CLIP = 0.5
EXPECTED = 6


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.unsqueeze(-1)
        return self.head((self.embed(input_ids) * weights).sum(1) / weights.sum(1))


class Loss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, img: Tensor, seg: Tensor) -> Tensor:
        return F.cross_entropy(self.net(img), seg)


class SkipGram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(11, 4), nn.Embedding(11, 4)

    def forward(self, centre: Tensor, context: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inner(centre)
        return (h * self.outer(context)).sum(-1), torch.einsum("nd,nkd->nk", h, self.outer(negatives))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.net = nn.Linear(1, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        return self.net(noisy + self.time(t[:, None]))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor, step: int, *, scale: bool = False, positions: Tensor | None = None) -> Tensor:
        assert positions is None or positions.shape == (6,)
        return self.net(x) * (1 + step) / (2 if scale else 1)


class ManyShapes(nn.Module):
    """Pictures of any shape, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3)

    def forward(self, pictures: list[Tensor]) -> Tensor:
        return torch.stack([self.net(p[None]).mean((0, 2, 3)) for p in pictures])


@dataclass(frozen=True)
class Script:
    model: Callable[[], nn.Module]
    item: Callable[[int, torch.Generator], Any]
    loss: Callable[[nn.Module, Any, int], Tensor]
    collate: Callable[[list[Any]], Any] = default_collate
    criterion: Any = None

    def loader(self) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(4)
        return DataLoader([self.item(i, draw) for i in range(24)], batch_size=EXPECTED, collate_fn=self.collate)


def pictures(i: int, g: torch.Generator) -> dict[str, Any]:
    return {"img": torch.randn(6, generator=g), "seg": i % 3, "name": str(i)}


def tokens(i: int, g: torch.Generator) -> tuple[Tensor, Tensor, int]:
    return torch.randint(0, 11, (5,), generator=g), (torch.arange(5) <= i % 5).float(), i % 3


def skip_gram(m: nn.Module, b: Any, step: int) -> Tensor:
    negatives = (b[0][:, None] + torch.arange(1, 4)) % 11
    good, bad = m(b[0], b[1], negatives)
    return -(F.logsigmoid(good) + F.logsigmoid(-bad).sum(-1)).mean()


def denoise(m: nn.Module, b: Any, step: int) -> Tensor:
    noise, t = torch.sin(37 * b), (b.sum(1).sin() + 1) / 2
    return F.mse_loss(m(b * t[:, None] + noise * (1 - t[:, None]), t), noise)


def detection(m: nn.Module, b: Any, step: int) -> Tensor:
    return F.cross_entropy(m([picture * 1 for picture, _ in b]), torch.tensor([label for _, label in b]))


def sized(i: int, g: torch.Generator) -> tuple[Tensor, int]:
    return torch.randn(1, 4 + i % 3, 5, generator=g), i % 3


def counted(m: nn.Module, b: Any, step: int) -> Tensor:
    return m(**{"x": b["img"], "y": b["seg"]}, count=torch.tensor(len(b["seg"])))["loss"]


class Counted(nn.Module):
    """As language models are trained: a sum of losses, divided by a number that the loop has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor, count: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = F.cross_entropy(logits, y, reduction="mean" if count is None else "sum")
        return {"loss": loss if count is None else loss / count, "logits": logits}


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 11)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.mix(h, h, h, attn_mask=mask, need_weights=False)[0])


def next_word(m: nn.Module, b: Any, step: int) -> Tensor:
    x = b[0].t()
    mask = nn.Transformer.generate_square_subsequent_mask(len(x) - 1)
    return F.cross_entropy(m(x[:-1], mask).permute(1, 2, 0), b[0][:, 1:])


class Detector(nn.Module):
    """Pictures of any shape and targets in lists; returns its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3)

    def forward(self, pictures: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = torch.stack([self.net(p[None]).mean((0, 2, 3)) for p in pictures])
        return {
            "loss_class": F.cross_entropy(found, torch.stack([t["label"] for t in targets])),
            "loss_box": F.mse_loss(found, torch.stack([t["box"] for t in targets])),
        }


def detect(m: nn.Module, b: Any, step: int) -> Tensor:
    losses = m([p.float() for p in b[0]], [{key: t.clone() for key, t in target.items()} for target in b[1]])
    return sum(losses.values())  # type: ignore[return-value]


def boxes(i: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(1, 4 + i % 3, 5, generator=g), {"label": torch.tensor(i % 3), "box": torch.randn(3, generator=g)}


def held(items: list[Any]) -> Any:
    made = type("Batch", (), {})()
    made.x, made.y = default_collate(items)
    made.itself = made
    return made


SCRIPTS = {
    "keywords": Script(
        Masked,
        tokens,
        lambda m, b, step: F.cross_entropy(m(input_ids=b[0], attention_mask=b[1]), b[2]),
        criterion=nn.CrossEntropyLoss(),
    ),
    "other keys, criterion told": Script(
        lambda: nn.Linear(6, 3),
        pictures,
        lambda m, b, step: F.cross_entropy(m(b["img"]), b["seg"]),
        criterion=nn.CrossEntropyLoss(),
    ),
    "other keys": Script(lambda: nn.Linear(6, 3), pictures, lambda m, b, step: F.cross_entropy(m(b["img"]), b["seg"])),
    "entries taken out": Script(
        lambda: nn.Linear(6, 3), pictures, lambda m, b, step: F.cross_entropy(m(b.pop("img")), b.pop("seg"))
    ),
    "returns its loss": Script(Loss, pictures, lambda m, b, step: m(b["img"], b["seg"])),
    "negative samples": Script(SkipGram, lambda i, g: (i % 11, (i * i) % 11), skip_gram),
    "noise and time": Script(Denoiser, lambda i, g: torch.randn(6, generator=g), denoise),
    "numbers and flags": Script(
        Flagged,
        pictures,
        lambda m, b, step: F.cross_entropy(m(b["img"], step, scale=step % 2 == 0, positions=torch.arange(6)), b["seg"]),
    ),
    "a list of samples": Script(ManyShapes, sized, detection, collate=list),
    "time first, and a mask": Script(TimeFirst, lambda i, g: (torch.randint(0, 11, (7,), generator=g),), next_word),
    "lists of pictures and targets": Script(
        Detector, boxes, detect, collate=lambda items: tuple(zip(*items, strict=False))
    ),
    "an object": Script(
        lambda: nn.Linear(6, 3),
        lambda i, g: (torch.randn(6, generator=g), i % 3),
        lambda m, b, step: F.cross_entropy(m(b.x), b.y),
        collate=held,
    ),
    "the number of samples": Script(Counted, pictures, counted),
    "transposed": Script(
        lambda: nn.Linear(6, 3),
        lambda i, g: (torch.randn(2, 6, generator=g), i % 3),
        lambda m, b, step: F.cross_entropy(m(b[0].transpose(0, 1).reshape(2, len(b[0]), 6)).mean(0), b[1]),
    ),
}
every_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def one_of(batch: Any, i: int) -> Any:
    """A batch with one sample of another."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    if hasattr(batch, "itself"):
        return SimpleNamespace(x=batch.x[i : i + 1], y=batch.y[i : i + 1])
    if isinstance(batch, tuple):
        return tuple(part[i : i + 1] for part in batch)
    if isinstance(batch, dict):
        return {key: one_of(part, i) for key, part in batch.items()}
    if isinstance(batch, list) and isinstance(batch[0], (tuple, str)):
        return batch[i : i + 1]
    return [one_of(part, i) for part in batch]


def size_of(batch: Any) -> int:
    first = batch["seg"] if isinstance(batch, dict) else batch
    return len(first[0]) if isinstance(first, list) and isinstance(first[0], Tensor) else len(first)


def start(script: Script, **changes: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = script.model()
    given: dict[str, Any] = {
        "module": model,
        "optimizer": sgd(model, EXPECTED),
        "data_loader": script.loader(),
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP,
        "criterion": script.criterion,
        "seed": 5,
    }
    return model, dpfix.make_private_safe(**(given | changes))


def drawn(private: Any) -> Iterator[tuple[Any, int]]:
    """Batches and how many samples were drawn for them."""
    for batch in private[2]:
        yield batch, private[2].ledger.pending()


@every_script
def test_every_step_releases_the_clipped_sum_of_batches_of_one(script: Script) -> None:
    model, private = start(script)
    for step, (batch, samples) in enumerate(drawn(private)):
        singles = [one_of(batch, i) for i in range(samples)]
        plain = script.model()
        plain.load_state_dict(model.state_dict())
        alone = gradients_one_by_one(plain, lambda m, b, step=step: script.loss(m, b, step), singles)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        private[1].zero_grad()
        script.loss(private[0], batch, step).backward()
        private[1].step()
        wanted = clipped_sum(alone, CLIP)
        for name, p in model.named_parameters():
            torch.testing.assert_close((before[name] - p).double(), wanted[name], atol=1e-5, rtol=1e-4)
    assert private.plan.engine and private.report.engine == private.plan.engine
    assert any("batch-of-one reference" in line for line in private.report.audit)
    assert "microbatch" not in private.plan.engine or script in (
        SCRIPTS["a list of samples"],
        SCRIPTS["lists of pictures and targets"],
    )


def test_the_report_says_so_before_the_first_step_and_is_complete_after_it() -> None:
    script = SCRIPTS["other keys, criterion told"]
    _, private = start(script)
    before = private.report
    assert before.engine == "" and private.plan.engine == ""
    assert [f.code for f in before.findings] == ["DPF043"]
    assert "first real step" in str(before)
    batch, _ = next(pair for pair in drawn(private) if pair[1])
    script.loss(private[0], batch, 0)
    assert "DPF043" not in private.report.details() and private.report.engine == private.plan.engine != ""
    assert private.report.settings == before.settings


def test_the_scripts_generators_and_the_model_are_as_without_the_audit() -> None:
    script = Script(
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
        pictures,
        lambda m, b, step: F.cross_entropy(m(b["img"]), b["seg"]),
    )
    model, private = start(script)
    batch, _ = next(pair for pair in drawn(private) if pair[1])
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before, state = values(model), (random.getstate(), str(np.random.get_state()))
    output = private[0](batch["img"])
    assert (random.getstate(), str(np.random.get_state())) == state
    assert torch.equal(values(model), before) and all(p.grad is None for p in model.parameters())
    torch.manual_seed(3)
    assert torch.equal(output, model(batch["img"]))


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, *, picture: Tensor) -> Tensor:
        return self.net(picture - picture.mean(0))


def test_what_is_refused_on_the_first_call_moves_nothing_and_is_refused_again() -> None:
    model, private = start(Script(Mixes, pictures, lambda m, b, step: m(picture=b["img"]).sum()))
    batch, _ = next(pair for pair in drawn(private) if (pair[1] or 0) > 1)
    before = values(model)
    for _ in range(2):
        with pytest.raises(dpfix.CoupledModelError, match="mixes the samples"):
            private[0](picture=batch["img"])
    assert torch.equal(values(model), before) and private.report.engine == ""
    assert private[1].guard.guarded.progress.released == 0


def test_a_number_that_the_loop_computes_from_the_batch_is_refused() -> None:
    script = Script(Counted, pictures, lambda m, b, step: m(b["img"], b["seg"], (b["seg"] > 0).sum())["loss"])
    _, private = start(script)
    batch, _ = next(
        pair for pair in drawn(private) if (pair[1] or 0) > 1 and int((pair[0]["seg"] > 0).sum()) != pair[1]
    )
    with pytest.raises(dpfix.TrainingStepError, match=r"called with argument 2 \(\).*depends on it"):
        script.loss(private[0], batch, 0)


def test_rows_that_are_no_samples_are_refused() -> None:
    script = Script(lambda: nn.Linear(6, 3), pictures, lambda m, b, step: m(b["img"].repeat(2, 1)).sum())
    _, private = start(script)
    batch, samples = next(pair for pair in drawn(private) if (pair[1] or 0) > 1)
    with pytest.raises(
        dpfix.TrainingStepError, match=rf"argument 0 \({2 * samples}, 6\), for {samples} sample.*which rows"
    ):
        script.loss(private[0], batch, 0)


def test_a_step_without_a_call_of_the_model_is_refused() -> None:
    model, private = start(SCRIPTS["other keys"])
    batch, _ = next(pair for pair in drawn(private) if pair[1])
    for p in model.parameters():
        p.grad_sample = torch.ones(size_of(batch), *p.shape)  # type: ignore[attr-defined]
    before = values(model)
    with pytest.raises(dpfix.MisuseError, match="no per-sample gradient has arrived"):
        private[1].step()
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("name", ["other keys", "noise and time"])
def test_an_empty_draw_before_the_first_is_noise_alone(name: str) -> None:
    script = SCRIPTS[name]
    loader = DataLoader(script.loader().dataset, batch_size=2)
    for seed in range(100):
        model, private = start(script, noise_multiplier=1.0, data_loader=loader, seed=seed)
        sizes = [samples for _, samples in drawn(private)]
        if sizes[0] == 0 and sum(sizes):
            break
    model, private = start(script, noise_multiplier=1.0, data_loader=loader, seed=seed)
    for number, (batch, samples) in enumerate(drawn(private)):
        before = values(model)
        assert size_of(batch) == (samples or 1)
        private[1].zero_grad()
        script.loss(private[0], batch, number).backward()
        private[1].step()
        assert not torch.equal(values(model), before)
    assert private.plan.engine


def test_what_the_loop_does_before_the_first_call_is_proven_in_that_step() -> None:
    script = Script(
        lambda: nn.Linear(6, 3), pictures, lambda m, b, step: m(b["img"] - b["img"].mean(0)).square().mean()
    )
    model, private = start(script)
    batch, _ = next(pair for pair in drawn(private) if (pair[1] or 0) > 2)
    before = values(model)
    with pytest.raises(dpfix.CoupledModelError, match="the loop mixes the samples"):
        script.loss(private[0], batch, 0).backward()
        private[1].step()
    assert private.plan.engine and torch.equal(values(model), before)


def test_a_loss_that_couples_the_samples_is_refused_where_the_call_was_not_told() -> None:
    script = Script(
        lambda: nn.Linear(6, 3),
        pictures,
        lambda m, b, step: F.cross_entropy(m(b["img"]), b["seg"], weight=torch.tensor([1.0, 5.0, 1.0])),
        criterion=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0])),
    )
    _, private = start(script)
    batch, _ = next(pair for pair in drawn(private) if (pair[1] or 0) > 2)
    with pytest.raises(dpfix.CoupledLossError, match="couples the samples"):
        script.loss(private[0], batch, 0).backward()


class Tasks(nn.Module):
    """A head per task, and a part that only some calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(6, 5), nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)})
        self.more = nn.Linear(6, 5)

    def forward(self, x: Tensor, task: str = "a", more: Tensor | None = None) -> Tensor:
        hidden = self.trunk(x) if more is None else self.trunk(x) + self.more(more)
        return self.heads[task](hidden.tanh())


def one_task(m: nn.Module, b: Any, step: int) -> Tensor:
    return F.cross_entropy(m(b["img"], "ab"[step % 2]), b["seg"])


def now_and_then_more(m: nn.Module, b: Any, step: int) -> Tensor:
    return F.cross_entropy(m(b["img"], more=b["img"].sin() if step % 2 else None), b["seg"])


def both_tasks(m: nn.Module, b: Any, step: int) -> Tensor:
    return sum(F.cross_entropy(m(b["img"], task), b["seg"]) for task in "ab")  # type: ignore[return-value]


def two_forms(m: nn.Module, b: Any, step: int) -> Tensor:
    return F.cross_entropy(m(b["img"]), b["seg"]) + F.cross_entropy(m(b["img"], more=b["img"] * 2), b["seg"])


def releases(script: Script, model: nn.Module, private: Any, batch: Any, samples: int, step: int) -> tuple[bool, bool]:
    """Whether a step releases the clipped sum of batches of one, and whether it moves anything."""
    plain = script.model()
    plain.load_state_dict(model.state_dict())
    singles = [one_of(batch, i) for i in range(samples)]
    alone = gradients_one_by_one(plain, lambda m, b: script.loss(m, b, step), singles)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    private[1].zero_grad()
    script.loss(private[0], batch, step).backward()
    private[1].step()
    moved = {n: (before[n] - p).double() for n, p in model.named_parameters()}
    wanted = clipped_sum(alone, CLIP)
    return all(torch.allclose(moved[n], w, 1e-4, 1e-5) for n, w in wanted.items()), any(map(torch.any, moved.values()))


@pytest.mark.parametrize("loss", [one_task, now_and_then_more])
def test_a_call_that_a_later_step_makes_is_learnt_there(loss: Any) -> None:
    script = Script(Tasks, pictures, loss)
    model, private = start(script)
    for step, (batch, samples) in enumerate(pair for pair in drawn(private) if pair[1]):
        assert releases(script, model, private, batch, samples, step) == (True, True)
    assert step > 1


@pytest.mark.parametrize("loss", [both_tasks, two_forms])
def test_a_step_with_several_calls_is_left_out_once_and_followed_from_then_on(loss: Any) -> None:
    script = Script(Tasks, pictures, loss)
    model, private = start(script, criterion=nn.CrossEntropyLoss())
    steps = [pair for pair in drawn(private) if pair[1]]
    model, private = start(script, criterion=nn.CrossEntropyLoss())
    found = []
    with pytest.warns(dpfix.DPFixWarning, match=r"several ways in one step[\s\S]*This step is not applied") as told:
        for step, (batch, samples) in enumerate(pair for pair in drawn(private) if pair[1]):
            found.append(releases(script, model, private, batch, samples, step))
    assert len(told) == 1 and len(found) == len(steps) > 2
    assert found == [(False, False)] + [(True, True)] * (len(found) - 1)
    assert sum(count for *_, count in private.privacy_engine.accountant.history) == len(found)


def test_the_loaders_collate_function_sees_no_sample_that_was_not_drawn() -> None:
    seen: list[int] = []

    def collate(items: list[Any]) -> Any:
        seen.append(len(items))
        return default_collate(items)

    script = SCRIPTS["other keys"]
    _, private = start(Script(script.model, script.item, script.loss, collate))
    batch, samples = next(pair for pair in drawn(private) if pair[1])
    script.loss(private[0], batch, 0)
    assert private.plan.engine and seen[-1] == samples


def test_a_told_training_step_decides_at_once() -> None:
    script = SCRIPTS["other keys"]
    _, private = start(script, training_step=lambda m, b: script.loss(m, b, 0))
    assert private.plan.engine and "real_calls" not in vars(private[1])


def test_nothing_is_left_on_the_model() -> None:
    script = SCRIPTS["keywords"]
    model, private = start(script)
    plain = private[0].to_standard_module()
    assert plain is model and not {"forward", "_call_impl"} & vars(model).keys()


def test_a_second_training_of_the_same_model() -> None:
    script = SCRIPTS["keywords"]
    model, _ = start(script)
    private = dpfix.make_private_safe(
        module=model,
        optimizer=sgd(model),
        data_loader=script.loader(),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
    )
    batch, _ = next(pair for pair in drawn(private) if pair[1])
    script.loss(private[0], batch, 0).backward()
    private[1].step()
