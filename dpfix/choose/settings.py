"""The privacy settings and versions of a report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from torch.utils.data import DataLoader

from dpfix.sampling.rate import batch_size, index_set, sample_rate
from dpfix.scan.options import Options


def settings(
    loader: DataLoader, options: Options, loss_reduction: str, noise_multiplier: float | None, views: int, ranks: int
) -> Mapping[str, str]:
    """The privacy settings in force, for the report.

    Args:
        loader: the user's loader.
        options: what was asked for.
        loss_reduction: ``"mean"`` or ``"sum"``.
        noise_multiplier: the noise; ``None`` in a diagnosis.
        views: views per sample.
        ranks: number of processes.

    Returns:
        Names and values.
    """
    poisson = f"Poisson, rate {sample_rate(loader):.6g}"
    several = {} if views == 1 else {"views per sample": str(views)}
    if ranks > 1:
        several["ranks"] = f"{ranks}, each works on its part of every batch; rank 0 adds the noise"
    return {
        "noise multiplier": "not set" if noise_multiplier is None else f"{noise_multiplier:g}",
        "clip norm": str(options.max_grad_norm),
        "clipping": options.clipping,
        "samples": str(len(index_set(loader))),
        "sampling": poisson if options.poisson_sampling else "the loader's own",
        "expected batch size": f"{batch_size(loader):g}",
        "loss reduction": loss_reduction,
    } | several


def versions() -> Mapping[str, str]:
    """Versions of the packages a report depends on.

    Returns:
        Versions by package name.
    """
    return {name: metadata.version(name) for name in ("torch", "opacus")}
