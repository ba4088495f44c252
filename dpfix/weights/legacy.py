"""Checkpoints of ``monai-generative`` 0.2.x in the networks that MONAI has taken over since 1.4.

For each kind of block of the new network, a function here says which keys its weights had in the old one. This was read in
the source of monai-generative 0.2.3, and the tests compare with its outputs:

* ``AttentionBlock`` defines ``proj_attn`` and never calls it; the new block has ``out_proj`` there, and calls it. The
  identity stands for what 0.2.3 computed, ``proj_attn`` for what code that repaired the call computed.
* ``CrossAttention.to_out.0`` is now ``out_proj``; ``Upsample.conv`` is now ``postconv``.
* A transformer block's ``norm2`` was the cross-attention's, and ``norm3`` the MLP's; now they are ``norm_cross_attn``
  and ``norm2``.
* The normalisation inside ``SPADE`` was ``param_free_norm.N`` and, in ``SPADEAutoencoderKL``, had torch's own epsilon.

Nothing here imports MONAI: blocks are recognised by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpfix.weights.conversion import Adjustment, Conversion

SOURCE = "monai-generative"
PROJECTIONS = ("identity", "proj_attn")

NETWORKS = (
    "AutoencoderKL",
    "ControlNet",
    "DecoderOnlyTransformer",
    "DiffusionModelUNet",
    "MultiScalePatchDiscriminator",
    "PatchDiscriminator",
    "SPADEAutoencoderKL",
    "SPADEDiffusionModelUNet",
    "SPADENet",
    "VQVAE",
)
"""Classes that both packages have."""

_NEVER_APPLIED = "defined and never applied by monai-generative 0.2.3"
_ASSUMED = (
    "the network has the arguments of the old one (numbers of heads and groups, eps, activations): weights do not hold them",
)
_ASSUMED_UPSAMPLING = (
    "the old network had use_convtranspose=False: the weights of a transposed convolution have the same shapes"
)


def networks_in(model: nn.Module) -> list[str]:
    """Module paths of the networks in a model that monai-generative had too."""
    return [path for path, module in model.named_modules() if _kind(module) in NETWORKS]


def convert(model: nn.Module, old: Mapping[str, Tensor], wanted: Mapping[str, Tensor], projection: str) -> Conversion:
    """The weights of an old network under the keys of a new one.

    Args:
        model: the new network, or a module that holds one.
        old: the old network's tensors by key.
        wanted: the new one's tensors by key.
        projection: see ``legacy_projection`` of :func:`dpfix.load_pretrained`.

    Returns:
        The conversion, with whatever does not fit.
    """
    conversion = Conversion(old, wanted, assumed=list(_ASSUMED))
    blocks = _blocks(projection)
    for path, module in model.named_modules():
        translate = blocks.get(_kind(module))
        if translate is not None:
            translate(conversion, f"{path}." if path else "", module)
    conversion.take_rest()
    return conversion


def _kind(module: nn.Module) -> str:
    """Name of the class of MONAI that a module is an instance of; empty if there is none."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("monai.")), "")


def _blocks(projection: str) -> dict[str, Callable[[Conversion, str, Any], None]]:
    return {
        "SpatialAttentionBlock": partial(_attention, projection=projection),
        "DiffusionUNetTransformerBlock": _diffusion_transformer,
        "TransformerBlock": _transformer,
        "UpSample": _upsample,
        "WrappedUpsample": _upsample,
        "SPADE": _spade,
        "SPADEResBlock": _spade_residual,
        "SPADENet": _spade_net,
    }


def _attention(conversion: Conversion, at: str, block: Any, projection: str) -> None:
    """Attention over space: the block itself had the projections, and the last one was not applied."""
    _queries(conversion, at, f"{at}attn.")
    applied = f"{at}attn.out_proj."
    if projection == "proj_attn":
        for name in ("weight", "bias"):
            conversion.take(f"{applied}{name}", f"{at}proj_attn.{name}")
        if isinstance(block.attn.out_proj, nn.Identity) and f"{at}proj_attn.weight" in conversion.old:
            conversion.refusals.append(
                f"`{at}attn` has include_fc=False, so there is no layer for {at}proj_attn.weight, and "
                "legacy_projection='proj_attn' says that it was applied. Build the model with include_fc=True."
            )
        return
    queries = conversion.old.get(f"{at}to_q.weight")
    if queries is not None:
        identity = torch.eye(len(queries), dtype=queries.dtype)
        conversion.fill(f"{applied}weight", identity, f"the identity: proj_attn is {_NEVER_APPLIED}")
        conversion.fill(f"{applied}bias", torch.zeros_like(identity[0]), f"zero: proj_attn is {_NEVER_APPLIED}")
    for name in ("weight", "bias"):
        conversion.drop(f"{at}proj_attn.{name}", _NEVER_APPLIED)


def _queries(conversion: Conversion, old: str, new: str) -> None:
    """Queries, keys and values: three layers, or one with the three concatenated."""
    for name in ("weight", "bias"):
        parts = [f"{old}to_{letter}.{name}" for letter in "qkv"]
        conversion.take(f"{new}qkv.{name}", *parts)
        for letter, part in zip("qkv", parts, strict=True):
            conversion.take(f"{new}to_{letter}.{name}", part)


def _diffusion_transformer(conversion: Conversion, at: str, block: Any) -> None:
    """Self- and cross-attention of the conditional networks; their last projection was applied."""
    for name in ("attn1", "attn2"):
        _queries(conversion, f"{at}{name}.", f"{at}{name}.")
        for kind in ("weight", "bias"):
            conversion.take(f"{at}{name}.out_proj.{kind}", f"{at}{name}.to_out.0.{kind}")
    _needs_projection(conversion, f"{at}attn1", block.attn1, f"{at}attn1.to_out.0")


def _transformer(conversion: Conversion, at: str, block: Any) -> None:
    """A block of the autoregressive transformer, whose normalisations have changed their names."""
    _queries(conversion, f"{at}attn.", f"{at}attn.")
    _needs_projection(conversion, f"{at}attn", block.attn, f"{at}attn.out_proj")
    for name in ("weight", "bias"):
        conversion.take(f"{at}norm2.{name}", f"{at}norm3.{name}")
        if block.with_cross_attention:
            conversion.take(f"{at}norm_cross_attn.{name}", f"{at}norm2.{name}")
        else:
            key = f"{at}norm_cross_attn.{name}"
            conversion.fill(
                key, conversion.wanted[key], "left as it is: a block without cross-attention does not use it"
            )


def _needs_projection(conversion: Conversion, path: str, attention: Any, old: str) -> None:
    if isinstance(attention.out_proj, nn.Identity) and f"{old}.weight" in conversion.old:
        conversion.refusals.append(
            f"`{path}` has include_fc=False, so there is no layer for {old}.weight, which monai-generative applied. "
            "Build the model with include_fc=True."
        )


def _upsample(conversion: Conversion, at: str, block: nn.Module) -> None:
    """Upsampling by copying, with a convolution behind it."""
    if hasattr(block, "deconv") and f"{at}conv.conv.weight" in conversion.old:
        conversion.refusals.append(
            f"`{at.rstrip('.')}` is a transposed convolution with kernel 2 in MONAI, and had kernel 3 in monai-generative: no "
            "weights of one compute the other. Keep using monai-generative for a model with use_convtranspose=True."
        )
    if _ASSUMED_UPSAMPLING not in conversion.assumed:
        conversion.assumed.append(_ASSUMED_UPSAMPLING)
    for key in conversion.wanted:
        if key.startswith(f"{at}postconv."):
            conversion.take(key, f"{at}conv.{key.removeprefix(f'{at}postconv.')}")


def _spade(conversion: Conversion, at: str, block: Any) -> None:
    """Normalisation conditioned on a segmentation; the one inside had torch's own epsilon and another key."""
    for key in conversion.wanted:
        if key.startswith(f"{at}param_free_norm."):
            conversion.take(key, f"{at}param_free_norm.N.{key.removeprefix(f'{at}param_free_norm.')}")


def _spade_residual(conversion: Conversion, at: str, block: Any) -> None:
    """A residual block of the SPADE autoencoder's decoder, whose normalisations now have the network's epsilon."""
    for name in ("norm1", "norm2"):
        norm = getattr(block, name).param_free_norm
        if norm.eps != _TORCH_EPS:
            why = "monai-generative 0.2.3 built this normalisation with torch's own epsilon"
            adjustment = Adjustment(norm, f"{at}{name}.param_free_norm", "eps", _TORCH_EPS, why)
            conversion.adjusted.append(adjustment)


_TORCH_EPS = 1e-5


def _spade_net(conversion: Conversion, at: str, network: Any) -> None:
    """The generator; only the variational one has a counterpart."""
    if not network.is_vae and f"{at}decoder.fc.weight" in conversion.old:
        conversion.refusals.append(
            f"`{at}decoder` starts with a convolution of the segmentation in MONAI (`conv_init`), and with a linear layer "
            "in monai-generative, whose own forward fails without a VAE. Build the model with is_vae=True, or train it anew."
        )
    for path, block in network.named_modules():
        if type(block).__name__ != "SPADENetResBlock":
            continue
        activation = block.activation
        if not isinstance(activation, nn.LeakyReLU) or activation.negative_slope != 0.2:
            conversion.refusals.append(
                f"`{at}{path}` has {activation!r} as its activation, and monai-generative had LeakyReLU(0.2) there whatever "
                "`act` was. Set that activation on the block, and load again."
            )
            return
