"""Networks of monai-generative 0.2.3 and their counterparts in MONAI: how to build both, and what to call.

Neither package is imported here. Weights are drawn from a seed by key and shape, so that a recording holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfix.weights.equivalence import draw_weights

SEED = 20
Calls = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Legacy:
    """One network.

    Attributes:
        name: id of the test.
        cls: class name, the same in both packages.
        old: arguments in monai-generative.
        new: arguments in MONAI that differ from or add to ``old``.
        calls: method names with the shapes of their arguments; an integer tensor is ``(highest, *shape)`` in a list.
        part: what of the output is compared.
        dtype: double precision, unless the code casts to float32 itself.
    """

    name: str
    cls: str
    old: Mapping[str, Any]
    calls: Calls
    new: Mapping[str, Any] = field(default_factory=dict)
    part: Callable[[Any], Any] = lambda output: output
    dtype: torch.dtype = torch.float64

    def build_old(self, package: Any) -> torch.nn.Module:
        """The network as monai-generative builds it, with drawn weights, in double precision."""
        model = getattr(package, self.cls)(**_copied(self.old)).to(self.dtype).eval()
        model.load_state_dict(self.weights(model.state_dict()))
        return model

    def build_new(self, package: Any, **changes: Any) -> torch.nn.Module:
        """Its counterpart in MONAI, in double precision, with weights of its own."""
        renamed = {"num_channels": "channels", "use_checkpointing": "use_checkpoint"}
        given = {renamed.get(k, k): v for k, v in _copied(self.old).items()} | dict(self.new) | changes
        torch.manual_seed(0)
        return getattr(package, self.cls)(**given).to(self.dtype).eval()

    def weights(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the old network by key."""
        fixed = frozenset(k for k in shapes if k.endswith("causal_mask"))
        return draw_weights(shapes, SEED, fixed)

    def inputs(self, method: str) -> tuple[Any, ...]:
        """Arguments of a call."""
        draw = np.random.Generator(np.random.PCG64(SEED))
        return tuple(_argument(spec, draw, self.dtype) for spec in self.calls[method])

    def run(self, model: torch.nn.Module, method: str) -> list[Tensor]:
        """The tensors that a call returns, with the random numbers of a seed."""
        from dpfix.instrument import pytree

        torch.manual_seed(SEED)
        with torch.no_grad():
            return pytree.tensors(self.part(getattr(model, method)(*self.inputs(method))))


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """SPADENet writes into the list it is given."""
    return {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}


def _argument(spec: Any, draw: np.random.Generator, dtype: torch.dtype) -> Any:
    if spec is None:
        return None
    if isinstance(spec, float):
        return spec
    if isinstance(spec, list):
        highest, *shape = spec
        return torch.from_numpy(draw.integers(0, highest, size=shape))
    return torch.from_numpy(draw.standard_normal(spec)).to(dtype)


def image(dims: int, channels: int = 1, size: float = 1) -> tuple[int, ...]:
    """Two images; ``size`` is in units of 8 pixels (4 voxels in 3D), or less than one."""
    return (2, channels, *[int(size * (8 if dims == 2 else 4))] * dims)


def autoencoder(name: str, dims: int = 2, new: Mapping[str, Any] | None = None, **changes: Any) -> Legacy:
    old = {
        "spatial_dims": dims,
        "num_channels": (8, 8),
        "attention_levels": (False, True),
        "num_res_blocks": 1,
        "latent_channels": 2,
        "norm_num_groups": 4,
    } | changes
    calls: Calls = {"encode": (image(dims),), "decode": (image(dims, 2, 0.5),), "forward": (image(dims),)}
    return Legacy(f"AutoencoderKL {name}", "AutoencoderKL", old, calls, new or {})


def spade_autoencoder(name: str, dims: int = 2) -> Legacy:
    base = autoencoder(name, dims)
    old = dict(base.old) | {"label_nc": 3, "spade_intermediate_channels": 8}
    seg = image(dims, 3)
    calls: Calls = {"encode": (image(dims),), "decode": (image(dims, 2, 0.5), seg), "forward": (image(dims), seg)}
    return Legacy(f"SPADEAutoencoderKL {name}", "SPADEAutoencoderKL", old, calls)


def diffusion(
    name: str,
    dims: int = 2,
    cls: str = "DiffusionModelUNet",
    new: Mapping[str, Any] | None = None,
    conditioned: bool = False,
    **changes: Any,
) -> Legacy:
    old = {
        "spatial_dims": dims,
        "in_channels": 1,
        "out_channels": 1,
        "num_res_blocks": 1,
        "num_channels": (8, 8),
        "attention_levels": (False, True),
        "norm_num_groups": 4,
        "num_head_channels": 4,
    } | changes
    context: Any = None
    if conditioned:
        old |= {"with_conditioning": True, "cross_attention_dim": 5, "transformer_num_layers": 2}
        context = (2, 3, 5)
    labels: Any = [4, 2] if "num_class_embeds" in old else None
    steps = [1000, 2]
    arguments: tuple[Any, ...] = (image(dims), steps, context, labels)
    if cls == "ControlNet":
        del old["out_channels"]
        old |= {"conditioning_embedding_in_channels": 1, "conditioning_embedding_num_channels": (4, 4)}
        arguments = (image(dims), steps, image(dims, size=2), 0.7, context, labels)
    if cls == "SPADEDiffusionModelUNet":
        old |= {"label_nc": 3, "spade_intermediate_channels": 8}
        arguments = (image(dims), steps, image(dims, 3), context, labels)
    return Legacy(f"{cls} {name}", cls, old, {"forward": arguments}, new or {})


def transformer(name: str, cross: bool, new: Mapping[str, Any] | None = None) -> Legacy:
    old = {
        "num_tokens": 9,
        "max_seq_len": 6,
        "attn_layers_dim": 8,
        "attn_layers_depth": 2,
        "attn_layers_heads": 2,
        "with_cross_attention": cross,
    }
    arguments: tuple[Any, ...] = ([9, 2, 5], (2, 3, 8)) if cross else ([9, 2, 5],)
    return Legacy(f"DecoderOnlyTransformer {name}", "DecoderOnlyTransformer", old, {"forward": arguments}, new or {})


def quantiser(name: str, dims: int) -> Legacy:
    old = {
        "spatial_dims": dims,
        "in_channels": 1,
        "out_channels": 1,
        "num_channels": (4, 4),
        "num_res_layers": 1,
        "num_res_channels": (4, 4),
        "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
        "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        "num_embeddings": 6,
        "embedding_dim": 4,
    }
    return Legacy(
        f"VQVAE {name}", "VQVAE", old, {"forward": (image(dims),), "encode": (image(dims),)}, dtype=torch.float32
    )


def discriminator(name: str, cls: str, size: int = 2, **changes: Any) -> Legacy:
    old = {"spatial_dims": 2, "num_channels": 2, "in_channels": 1, "num_layers_d": 2} | changes
    return Legacy(f"{cls} {name}".strip(), cls, old, {"forward": (image(2, size=size),)})


def spade_net(name: str, **changes: Any) -> Legacy:
    old = {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        "label_nc": 3,
        "input_shape": [8, 8],
        "num_channels": [8, 8],
        "z_dim": 4,
        "spade_intermediate_channels": 8,
    } | changes
    calls: Calls = {"forward": (image(2, 3), image(2))}
    return Legacy(f"SPADENet {name}", "SPADENet", old, calls, part=lambda output: output[0])


COMBINED = {"use_combined_linear": True}
WITHOUT_FC = {"include_fc": False}

ZOO: tuple[Legacy, ...] = (
    autoencoder("2D"),
    autoencoder("3D", 3),
    autoencoder("attention in the levels only", with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False),
    autoencoder("non-local attention only", attention_levels=(False, False)),
    autoencoder("combined linear", new=COMBINED),
    autoencoder("without fc", new=WITHOUT_FC),
    autoencoder("combined linear without fc", new=COMBINED | WITHOUT_FC),
    autoencoder("flash attention", new={"use_flash_attention": True}),
    diffusion("2D"),
    diffusion("3D", 3),
    diffusion("up-down residual blocks", resblock_updown=True),
    diffusion("class embedding", num_class_embeds=4),
    diffusion("combined linear", new=COMBINED),
    diffusion("without fc", new=WITHOUT_FC),
    diffusion("conditional 2D", conditioned=True),
    diffusion("conditional 3D", 3, conditioned=True),
    diffusion("conditional combined linear", conditioned=True, new=COMBINED),
    diffusion("conditional everything", conditioned=True, resblock_updown=True, num_class_embeds=4),
    diffusion("2D", cls="ControlNet"),
    diffusion("conditional 2D", cls="ControlNet", conditioned=True),
    diffusion("conditional 3D", 3, cls="ControlNet", conditioned=True, resblock_updown=True, num_class_embeds=4),
    spade_autoencoder("2D"),
    spade_autoencoder("3D", 3),
    diffusion("2D", cls="SPADEDiffusionModelUNet"),
    diffusion("conditional 3D", 3, cls="SPADEDiffusionModelUNet", conditioned=True, num_class_embeds=4),
    spade_net("as VAE", is_vae=True),
    transformer("", cross=False),
    transformer("with cross-attention", cross=True),
    transformer("with cross-attention, combined linear", cross=True, new=COMBINED),
    quantiser("2D", 2),
    quantiser("3D", 3),
    discriminator("", "PatchDiscriminator"),
    discriminator("", "MultiScalePatchDiscriminator", 4, num_d=2, num_layers_d=1, minimum_size_im=32),
)
"""Networks whose counterpart in MONAI can compute the same."""

REFUSED: tuple[Legacy, ...] = (
    autoencoder("transposed convolution", use_convtranspose=True),
    spade_net("without VAE", is_vae=False),
    diffusion("conditional without fc", conditioned=True, new=WITHOUT_FC),
    transformer("without fc", cross=False, new=WITHOUT_FC),
)
"""Networks whose counterpart computes another function whatever its weights are."""
