"""Adapters of PEFT on frozen architectures of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as hf

from benchmarks.zoo.families.huggingface import LENGTH, SMALL, TEXT, WORDS, classify_text, next_word, padded, translate
from benchmarks.zoo.network import Network
from benchmarks.zoo.samples import both, tokens

TASK = "PEFT"
GPT2 = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
LLAMA = {**TEXT, **SMALL, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
T5 = {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SMALL, num_labels=3))


def t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5))


def half(build: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: build().to(torch.bfloat16)


def checkpointed(build: Callable[[], Any]) -> Callable[[], Any]:
    def built() -> Any:
        model = build()
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    return built


def _row(name: str, base: Callable[[], Any], config: Any, **options: Any) -> Network:
    kind = config.task_type
    sample, loss = {
        peft.TaskType.CAUSAL_LM: (tokens(WORDS, LENGTH), next_word),
        peft.TaskType.SEQ_CLS: (padded, classify_text),
        peft.TaskType.SEQ_2_SEQ_LM: (both(tokens(WORDS, LENGTH), tokens(WORDS, 7)), translate),
    }[kind]
    return Network(name, TASK, lambda: peft.get_peft_model(base(), config), sample, loss, **options)


def _lora(kind: Any = peft.TaskType.CAUSAL_LM, **options: Any) -> Any:
    return peft.LoraConfig(task_type=kind, r=4, lora_dropout=0.1, **options)


WORD, LABEL, PAIR = peft.TaskType.CAUSAL_LM, peft.TaskType.SEQ_CLS, peft.TaskType.SEQ_2_SEQ_LM

NETWORKS: tuple[Network, ...] = (
    _row("LoRA, Llama", llama, _lora(target_modules=["q_proj", "v_proj"])),
    _row("LoRA, BERT", bert, _lora(LABEL)),
    _row("LoRA, GPT-2, checkpoints", checkpointed(gpt2), _lora()),
    _row("LoRA in float32 on bfloat16, Llama", half(llama), _lora(), dtype=torch.float32),
    _row("DoRA, Llama", llama, _lora(use_dora=True)),
    _row("DoRA, Llama, checkpoints", checkpointed(llama), _lora(use_dora=True)),
    _row("LoRA of words too, Llama", llama, _lora(target_modules=["q_proj", "embed_tokens"])),
    _row("IA3, T5", t5, peft.IA3Config(task_type=PAIR)),
    _row("prompt tuning, GPT-2", gpt2, peft.PromptTuningConfig(task_type=WORD, num_virtual_tokens=4)),
    _row(
        "prompt tuning, GPT-2, checkpoints",
        checkpointed(gpt2),
        peft.PromptTuningConfig(task_type=WORD, num_virtual_tokens=4),
    ),
    _row("prompt tuning, BERT", bert, peft.PromptTuningConfig(task_type=LABEL, num_virtual_tokens=4)),
    _row("prompt tuning, T5", t5, peft.PromptTuningConfig(task_type=PAIR, num_virtual_tokens=4)),
    _row(
        "P-tuning, GPT-2", gpt2, peft.PromptEncoderConfig(task_type=WORD, num_virtual_tokens=4, encoder_hidden_size=16)
    ),
    _row("prefix tuning, GPT-2", gpt2, peft.PrefixTuningConfig(task_type=WORD, num_virtual_tokens=4)),
    _row("prefix tuning, Llama", llama, peft.PrefixTuningConfig(task_type=WORD, num_virtual_tokens=4)),
)
