"""Architectures of ``transformers``, random and tiny, each with the loss that the model computes itself."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn

from benchmarks.common.libraries import Step
from benchmarks.zoo.network import Network
from benchmarks.zoo.samples import Sample, both, image, tokens

TASKS = (
    "transformers: encoders",
    "transformers: decoders",
    "transformers: encoder and decoder",
    "transformers: vision",
    "transformers: audio",
    "transformers: state spaces",
)
ENCODER, DECODER, PAIR, VISION, AUDIO, STATES = TASKS
WORDS, LENGTH = 60, 12
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {"vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0}
LABELS = {"num_labels": 3}


def padded(g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words, the mask that leaves padding out, and a class."""
    length = int(torch.randint(4, LENGTH + 1, (), generator=g))
    mask = (torch.arange(LENGTH) < length).long()
    words = torch.randint(3, WORDS, (LENGTH,), generator=g) * mask
    return words, mask, torch.randint(3, (), generator=g)


def classify_text(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss


def classify_image(model: nn.Module, batch: Any) -> Tensor:
    return model(pixel_values=batch[0], labels=batch[1]).loss


def next_word(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], labels=batch[0]).loss


def translate(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], labels=batch[1]).loss


def classify_sound(model: nn.Module, batch: Any) -> Tensor:
    return model(input_values=batch[0], labels=batch[1]).loss


def transcribe(model: nn.Module, batch: Any) -> Tensor:
    return model(input_features=batch[0], labels=batch[1]).loss


def contrast(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], pixel_values=batch[1], return_loss=True).loss


def segment(model: nn.Module, batch: Any) -> Tensor:
    return model(pixel_values=batch[0], labels=batch[1]).loss


def segmented(g: Generator) -> tuple[Tensor, Tensor]:
    return image(3, 64, 64)(g)[0], torch.randint(3, (64, 64), generator=g)


def _row(
    name: str, task: str, sample: Sample, loss: Step, kind: str, head: str, settings: dict[str, Any], **options: Any
) -> Network:
    def build() -> nn.Module:
        return getattr(hf, head)(getattr(hf, kind)(**settings))

    return Network(name, task, build, sample, loss, **options)


def _encoders() -> list[Network]:
    def row(name: str, kind: str, settings: dict[str, Any] | None = None, head: str = "", **options: Any) -> Network:
        settings = {**TEXT, **LABELS, **(SMALL if settings is None else settings)}
        return _row(
            name,
            ENCODER,
            padded,
            classify_text,
            f"{kind}Config",
            head or f"{kind}ForSequenceClassification",
            settings,
            **options,
        )

    distil = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "seq_classif_dropout": 0.1}
    positions = {**SMALL, "max_position_embeddings": 40}
    return [
        row("BERT", "Bert"),
        _row(
            "BERT, masked words",
            ENCODER,
            tokens(WORDS, LENGTH),
            next_word,
            "BertConfig",
            "BertForMaskedLM",
            {**TEXT, **SMALL},
        ),
        row("DistilBERT", "DistilBert", distil),
        row("ALBERT", "Albert", {**SMALL, "embedding_size": 16}),
        row("RoBERTa", "Roberta", {**positions, "pad_token_id": 1}),
        row(
            "DeBERTa-v2",
            "DebertaV2",
            {
                **SMALL,
                "relative_attention": True,
                "pos_att_type": ["c2p", "p2c"],
                "position_buckets": 8,
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "position_biased_input": False,
            },
        ),
        row(
            "DeBERTa",
            "Deberta",
            {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
        ),
        row("ELECTRA", "Electra", {**SMALL, "embedding_size": 16}),
        row("MPNet", "MPNet", positions),
        _row(
            "XLNet",
            ENCODER,
            padded,
            classify_text,
            "XLNetConfig",
            "XLNetForSequenceClassification",
            {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **LABELS},
        ),
        row(
            "SqueezeBERT",
            "SqueezeBert",
            {
                **SMALL,
                "embedding_size": 32,
                "q_groups": 2,
                "k_groups": 2,
                "v_groups": 2,
                "post_attention_groups": 1,
                "intermediate_groups": 2,
                "output_groups": 2,
            },
        ),
        row(
            "ModernBERT",
            "ModernBert",
            {**SMALL, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 8},
        ),
    ]


def _decoders() -> list[Network]:
    def row(name: str, kind: str, settings: dict[str, Any], head: str = "", **options: Any) -> Network:
        return _row(
            name,
            DECODER,
            tokens(WORDS, LENGTH),
            next_word,
            f"{kind}Config",
            head or f"{kind}ForCausalLM",
            {**TEXT, "bos_token_id": 1, "eos_token_id": 2, **settings},
            **options,
        )

    grouped = {**SMALL, "num_key_value_heads": 2}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return [
        row("GPT-2", "GPT2", gpt, "GPT2LMHeadModel"),
        row(
            "GPT-Neo",
            "GPTNeo",
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "intermediate_size": 48,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
            },
        ),
        row("GPT-NeoX", "GPTNeoX", SMALL),
        row("GPT-J", "GPTJ", {**gpt, "rotary_dim": 4}),
        row(
            "OPT",
            "OPT",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 48,
                "word_embed_proj_dim": 32,
            },
        ),
        row("Bloom", "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        row("Llama", "Llama", grouped),
        row("Mistral", "Mistral", {**grouped, "sliding_window": 6}),
        row("Mixtral", "Mixtral", {**grouped, "num_local_experts": 4}, dtype=torch.float32),
        row("Qwen2", "Qwen2", grouped),
        row("Qwen3", "Qwen3", {**grouped, "head_dim": 8}),
        row("Gemma", "Gemma", {**grouped, "head_dim": 8}),
        row("Gemma 2", "Gemma2", {**grouped, "head_dim": 8, "sliding_window": 6}),
        row("Phi", "Phi", grouped),
        row("Phi-3", "Phi3", grouped),
        row("Falcon", "Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ]


def _pairs() -> list[Network]:
    sample = both(tokens(WORDS, LENGTH), tokens(WORDS, 7))
    bart = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "decoder_start_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

    def row(name: str, kind: str, settings: dict[str, Any], **options: Any) -> Network:
        return _row(
            name,
            PAIR,
            sample,
            translate,
            f"{kind}Config",
            f"{kind}ForConditionalGeneration",
            {**TEXT, **settings},
            **options,
        )

    return [
        row("T5", "T5", t5),
        row("LongT5", "LongT5", t5),
        row("BART", "Bart", bart),
        row("mBART", "MBart", bart),
        row("Pegasus", "Pegasus", bart),
        row("M2M100", "M2M100", bart),
    ]


def _vision() -> list[Network]:
    def row(
        name: str,
        kind: str,
        settings: dict[str, Any],
        head: str = "",
        sample: Sample | None = None,
        loss: Step = classify_image,
        **options: Any,
    ) -> Network:
        return _row(
            name,
            VISION,
            sample or image(3, 32, 32, classes=3),
            loss,
            f"{kind}Config",
            head or f"{kind}ForImageClassification",
            {**LABELS, **settings},
            **options,
        )

    vit = {**SMALL, "image_size": 32, "patch_size": 8}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = {
        "text_config": {**tower, **TEXT, "bos_token_id": 1, "eos_token_id": 2},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8},
        "projection_dim": 16,
    }
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return [
        row("ViT", "ViT", vit),
        row("DeiT", "DeiT", vit),
        row("BEiT", "Beit", {**vit, "use_relative_position_bias": True}),
        row("DINOv2", "Dinov2", vit),
        row("Swin", "Swin", swin),
        row("Swin v2", "Swinv2", swin),
        row("ConvNeXt", "ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
        row("ConvNeXt v2", "ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
        row(
            "ResNet", "ResNet", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
        ),
        row(
            "SegFormer",
            "Segformer",
            {
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 2, 4],
                "decoder_hidden_size": 16,
            },
            "SegformerForSemanticSegmentation",
            segmented,
            segment,
        ),
        row(
            "MobileViT",
            "MobileViT",
            {
                "image_size": 64,
                "hidden_sizes": [16, 20, 24],
                "neck_hidden_sizes": [8, 8, 16, 16, 20, 24, 32],
                "num_attention_heads": 4,
            },
            sample=image(3, 64, 64, classes=3),
        ),
        row(
            "PVT",
            "Pvt",
            {
                "image_size": 64,
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 2, 4],
            },
            sample=image(3, 64, 64, classes=3),
        ),
        row("CLIP, classes", "CLIP", clip, "CLIPForImageClassification"),
        row(
            "CLIP, contrastive",
            "CLIP",
            clip,
            "CLIPModel",
            both(tokens(WORDS, LENGTH), image(3, 32, 32)),
            contrast,
            refusal="DPF014",
        ),
    ]


def _audio() -> list[Network]:
    def sound(g: Generator) -> tuple[Tensor, ...]:
        return torch.randn(1600, generator=g), torch.randint(3, (), generator=g)

    def speech(g: Generator) -> tuple[Tensor, ...]:
        return torch.randn(16, 40, generator=g), torch.randint(3, WORDS, (7,), generator=g)

    wave = {
        **SMALL,
        **LABELS,
        "conv_dim": [16, 16],
        "conv_stride": [5, 4],
        "conv_kernel": [10, 5],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 16,
        "mask_time_length": 2,
        "layerdrop": 0.1,
    }
    whisper = {
        "vocab_size": WORDS,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }

    def row(name: str, kind: str, **settings: Any) -> Network:
        head = f"{kind}ForSequenceClassification"
        return _row(name, AUDIO, sound, classify_sound, f"{kind}Config", head, wave | settings)

    return [
        row("Wav2Vec2", "Wav2Vec2"),
        row("HuBERT", "Hubert"),
        row("WavLM", "WavLM"),
        row("Wav2Vec2, no SpecAugment", "Wav2Vec2", apply_spec_augment=False),
        row("HuBERT, no SpecAugment", "Hubert", apply_spec_augment=False),
        row("WavLM, no SpecAugment", "WavLM", apply_spec_augment=False),
        _row("Whisper", AUDIO, speech, transcribe, "WhisperConfig", "WhisperForConditionalGeneration", whisper),
    ]


def _states() -> list[Network]:
    def row(name: str, kind: str, settings: dict[str, Any]) -> Network:
        return _row(
            name, STATES, tokens(WORDS, LENGTH), next_word, f"{kind}Config", f"{kind}ForCausalLM", {**TEXT, **settings}
        )

    return [
        row("Mamba", "Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        row(
            "Mamba 2",
            "Mamba2",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "state_size": 4,
                "num_heads": 4,
                "head_dim": 16,
                "n_groups": 1,
                "chunk_size": 4,
            },
        ),
        row(
            "RWKV",
            "Rwkv",
            {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 32},
        ),
        row(
            "RecurrentGemma",
            "RecurrentGemma",
            {
                **SMALL,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "lru_width": 32,
                "attention_window_size": 8,
                "num_hidden_layers": 3,
            },
        ),
    ]


NETWORKS: tuple[Network, ...] = (*_encoders(), *_decoders(), *_pairs(), *_vision(), *_audio(), *_states())
