"""``transformers.Trainer`` in private training: unchanged but for one line or one callback."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpfix
from tests.reference import clipped_sum, gradients_one_by_one

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from dpfix.integrations import huggingface  # noqa: E402

CLIP = 0.5
BATCH = 6
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch|transformers|accelerate|peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout"),
]

Sample = dict[str, Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    transformers.logging.set_verbosity_error()


def texts(labels: Callable[[list[int]], Any], samples: int = 24, low: int = 4, high: int = 9) -> list[Sample]:
    """Tokenised texts of several lengths, as a tokenizer delivers them."""
    draw, found = torch.Generator().manual_seed(7), []
    for _ in range(samples):
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        ids = torch.randint(5, 40, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels(ids)})
    return found


def padded(items: list[Sample]) -> dict[str, Tensor]:
    """Padded to the longest."""
    longest = max(len(item["input_ids"]) for item in items)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([item[name] + [fill] * (longest - len(item[name])) for item in items])

    several = isinstance(items[0]["labels"], list)
    labels = column("labels", -100) if several else torch.tensor([item["labels"] for item in items])
    return {"input_ids": column("input_ids", 0), "attention_mask": column("attention_mask", 0), "labels": labels}


def bert(**changes: Any) -> nn.Module:
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small, **none, **changes))


def gpt2() -> nn.Module:
    small = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **none))


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn"], lora_dropout=0.0, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    return peft.get_peft_model(gpt2(), config)


def two_classes() -> list[Sample]:
    return texts(lambda ids: ids[0] % 2)


def next_tokens() -> list[Sample]:
    return texts(list)


class Watched:
    """What a training releases first, and the samples that it was made of."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.batches, self.first = model, list[list[Sample]](), dict[str, Tensor]()
        self.drawn: list[Sample] = []
        self.before = {n: p.detach().clone() for n, p in model.state_dict().items()}

    def collate(self, items: list[Sample]) -> dict[str, Tensor]:
        self.batches.append(items)
        return padded(items)

    def step(self, optimizer: Any, *_: Any) -> None:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if (
            not self.first
            and not hasattr(optimizer, "original_optimizer")
            and type(optimizer).__module__ != "accelerate.optimizer"
        ) and ids & {id(p) for p in trained.values()}:
            self.first = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
            self.drawn = self.batches[-1]


def train(
    way: str, folder: Path, model: nn.Module, data: list[Sample], cls: Any = None, *, noise: float = 0.0, **changes: Any
) -> tuple[Any, Any, Watched]:
    """Train for some steps; ``way`` is the line or the callback."""
    watched, resume = Watched(model), changes.pop("resume", None)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": BATCH, "max_steps": 3, "report_to": [],
            "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1,
        } | changes
    )  # fmt: skip
    given = {"noise_multiplier": noise, "max_grad_norm": CLIP, "delta": 1e-3, "cache": False}
    callbacks = [huggingface.PrivateCallback(**given)] if way == "callback" else []
    trainer = (cls or transformers.Trainer)(
        model=model, args=args, train_dataset=data, data_collator=watched.collate, callbacks=callbacks
    )
    private = huggingface.make_private(trainer, **given) if way == "line" else None
    handle = register_optimizer_step_pre_hook(watched.step)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        handle.remove()
    return trainer, private or callbacks[0].private, watched


def off(watched: Watched, fresh: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> float:
    """How far the first released sum is from that of batches of one, relatively."""
    fresh.load_state_dict(watched.before)
    singles = [padded([item]) for item in watched.drawn]
    wanted = clipped_sum(gradients_one_by_one(fresh.train(), loss, singles), CLIP)
    total = sum(float((watched.first[n] - wanted[n] / BATCH).square().sum()) for n in watched.first)
    return (total / sum(float((wanted[n] / BATCH).square().sum()) for n in watched.first)) ** 0.5


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def keys_of(folder: Path) -> Iterator[str]:
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        yield from load_file(file)


WAYS = pytest.mark.parametrize("way", ["line", "callback"])


@WAYS
@pytest.mark.parametrize(
    ("build", "data"),
    [(bert, two_classes), (gpt2, next_tokens), (lora, next_tokens)],
    ids=["classes", "tokens", "lora"],
)
def test_the_released_sum_is_that_of_batches_of_one(
    way: str, build: Callable[[], nn.Module], data: Callable[[], list[Sample]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    _, private, watched = train(way, tmp_path, model, data())
    assert private.plan.engine == "bookkeeping"
    assert off(watched, build(), own_loss) < 1e-4
    said = [f for f in private.report.findings if f.code == "DPF044"]
    assert len(said) == (data is next_tokens)


def test_the_trainer_logs_epsilon_and_no_gradient_norm(tmp_path: Path) -> None:
    trainer, private, _ = train("line", tmp_path, bert(), two_classes(), noise=1.0)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["epsilon"] for entry in logs] == sorted(entry["epsilon"] for entry in logs)
    assert logs[-1]["epsilon"] == pytest.approx(private.get_epsilon(1e-3))
    assert not [entry for entry in logs if "grad_norm" in entry]


def test_label_smoothing_is_averaged_per_sample(tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    def loss(model: nn.Module, batch: Any) -> Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        return LabelSmoother(0.1)(model(**batch), labels, shift_labels=True)

    _, private, watched = train("line", tmp_path, gpt2(), next_tokens(), label_smoothing_factor=0.1)
    assert off(watched, gpt2(), loss) < 1e-4
    assert "from the outputs of the model" in private.report.details()


def test_a_loss_of_a_subclass_is_averaged_per_sample(tmp_path: Path) -> None:
    weights = torch.tensor([1.0, 3.0])

    class Weighted(transformers.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels, weight=weights)
            return (loss, outputs) if return_outputs else loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        batch = dict(batch)
        return F.cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
                               batch["labels"], weight=weights)  # fmt: skip

    _, _, watched = train("line", tmp_path, bert(), two_classes(), Weighted)
    assert off(watched, bert(), loss) < 1e-4


@WAYS
def test_mixed_precision_trains_in_it(way: str, tmp_path: Path) -> None:
    _, _, watched = train(way, tmp_path, bert(), two_classes(), bf16=True)
    assert 1e-6 < off(watched, bert(), own_loss) < 3e-2


@WAYS
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_accounts_every_step_once(way: str, workers: int, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "noise": 1.0, "dataloader_num_workers": workers}
    train(way, tmp_path, bert(), two_classes(), **saving)
    saved = tmp_path / "checkpoint-3"
    _, private, _ = train(way, tmp_path, bert(), two_classes(), max_steps=6, resume=str(saved), **saving)
    assert sum(entry[-1] for entry in private.privacy_engine.accountant.history) == 6


def test_saved_weights_are_those_of_the_plain_model(tmp_path: Path) -> None:
    model = gpt2()
    train("line", tmp_path, model, next_tokens(), save_strategy="steps", save_steps=3)
    saved = tmp_path / "checkpoint-3"
    assert not [key for key in keys_of(saved) if "_module" in key]
    again = transformers.GPT2LMHeadModel.from_pretrained(saved)
    batch = padded(next_tokens()[:3])
    with torch.no_grad():
        assert torch.allclose(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_evaluation_keeps_the_loss_of_the_trainer(tmp_path: Path) -> None:
    model = gpt2()
    trainer, _, _ = train("line", tmp_path, model, next_tokens())
    few = next_tokens()[:4]
    plain = transformers.Trainer(model=model, args=trainer.args, data_collator=padded)
    assert trainer.evaluate(few)["eval_loss"] == pytest.approx(plain.evaluate(few)["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gradient_accumulation_steps": 2}, "per_device_train_batch_size=12"),
        ({"auto_find_batch_size": True}, "leave auto_find_batch_size out"),
    ],
)
def test_what_cannot_be_private_is_refused_with_the_way_out(changes: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(dpfix.DPFixError, match=says):
        train("line", tmp_path, bert(), two_classes(), **changes)


def test_a_refused_trainer_is_as_it_was(tmp_path: Path) -> None:
    class Coupled(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            logits = model(**inputs).logits
            return (logits - logits.mean(0)).square().sum() * len(logits)

    model = bert()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=6
    )
    trainer = Coupled(model=model, args=args, train_dataset=two_classes(), data_collator=padded)
    before = set(vars(trainer)), len(model._forward_hooks), len(model._forward_pre_hooks)
    with pytest.raises(dpfix.DPFixError):
        huggingface.make_private(trainer, noise_multiplier=1.0, max_grad_norm=1.0)
    assert (set(vars(trainer)), len(model._forward_hooks), len(model._forward_pre_hooks)) == before
    assert trainer.optimizer is None


def test_a_trainer_gets_no_parts_of_batches(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model=bert(), args=args, train_dataset=two_classes(), data_collator=padded)
    with pytest.raises(dpfix.ArgumentError, match="it counts a step for every part of a batch"):
        huggingface.make_private(trainer, noise_multiplier=1.0, max_grad_norm=1.0, max_physical_batch_size=2)


def test_a_late_callback_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = bert()
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=two_classes(), data_collator=padded)
    trainer.add_callback(huggingface.PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpfix.DPFixError, match="was added to a Trainer that was made already"):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters()))


def test_another_optimizer_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = bert()
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=two_classes(), data_collator=padded)
    huggingface.make_private(trainer, noise_multiplier=1.0, max_grad_norm=1.0, cache=False)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpfix.DPFixError, match="another optimizer or loader"):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters()))


def test_accumulation_in_an_accelerate_loop_is_refused_before_anything_moves() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = bert()
    loader = torch.utils.data.DataLoader(two_classes(), BATCH, collate_fn=padded, shuffle=True)  # type: ignore[arg-type]
    objects = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader)
    names = ("module", "optimizer", "data_loader")
    model, optimizer, loader = dpfix.make_private_safe(
        **dict(zip(names, objects, strict=True)), noise_multiplier=1.0, max_grad_norm=1.0, cache=False
    )
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpfix.DPFixError, match="gradient_accumulation_steps=1"):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert all(map(torch.equal, before, model.parameters()))


def test_importing_dpfix_imports_none_of_it() -> None:
    code = "import dpfix, sys; assert not {'transformers', 'accelerate', 'peft', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)


def test_the_page_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "huggingface.md").read_text()
    namespace: dict[str, object] = {"__name__": "example"}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, block.start(1))
        with warnings.catch_warnings():
            exec(compile("\n" * line + block[1], "docs/huggingface.md", "exec"), namespace)
    assert "privacy statement" in capsys.readouterr().out


OWNERS = [i % 5 if i < 12 else 5 + i % 3 for i in range(24)]


def test_persons_are_drawn_and_averaged(tmp_path: Path) -> None:
    """Named by a key that the model does not take."""
    torch.manual_seed(0)
    model, data = bert(), [{**sample, "user": owner} for sample, owner in zip(two_classes(), OWNERS, strict=True)]
    plain, drawn = copy.deepcopy(model), list[list[Sample]]()

    def collate(items: list[Sample]) -> dict[str, Tensor]:
        drawn.append(items)
        return padded(items)

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    private = huggingface.make_private(
        trainer, noise_multiplier=0.0, max_grad_norm=CLIP, cache=False, privacy_unit="user", seed=1
    )
    drawn.clear()
    trainer.train()
    items, by_person = max(drawn, key=len), []
    of = [next(o for s, o in zip(data, OWNERS, strict=True) if s["input_ids"] == i["input_ids"]) for i in items]
    assert sorted(of) == sorted(o for o in OWNERS if o in of) and len(set(of)) > 1
    for owner in set(of):
        each = gradients_one_by_one(
            plain.train(), own_loss, [padded([i]) for i, o in zip(items, of, strict=True) if o == owner]
        )
        by_person.append({n: torch.stack([g[n] for g in each]).mean(0) for n in each[0]})
    wanted = clipped_sum(by_person, CLIP)
    moved = [(p - q).detach() for p, q in zip(plain.parameters(), model.parameters(), strict=True)]
    error = sum(float((m - w.float() / 3).square().sum()) for m, w in zip(moved, wanted.values(), strict=True))
    assert error**0.5 < 1e-3 * sum(float((w / 3).square().sum()) for w in wanted.values()) ** 0.5
    assert private.plan.engine == "bookkeeping"
    assert private.statement(1e-3).counted == "persons" and private.report.settings["persons"].startswith("8 (24 items")
