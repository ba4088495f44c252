"""The user's own objects, out of an earlier private training that they may be in."""

from __future__ import annotations

from dataclasses import replace

from opacus.grad_sample import AbstractGradSampleModule
from torch import nn

from dpfix.errors import ArgumentError
from dpfix.rules import compiled
from dpfix.sampling.loader import PrivateDataLoader, augmentation_of
from dpfix.sampling.ranks import Ranks
from dpfix.sampling.shared_out import for_all_ranks
from dpfix.scan.arguments import check_objects
from dpfix.scan.request import Request
from dpfix.training import in_training


def as_trained(request: Request) -> Request:
    """The model without ``torch.compile``; the loader of an earlier call goes on delivering views, of whole batches."""
    privacy = request.privacy
    if privacy.augmentation is None:
        privacy = replace(privacy, augmentation=augmentation_of(request.data_loader))
    loader = request.data_loader
    if isinstance(loader, PrivateDataLoader):
        loader = loader.whole()
    return replace(request, module=compiled.unwrap(request.module), data_loader=loader, privacy=privacy)


def out_of_earlier(request: Request) -> Request:
    """The model as it is trained, its own optimizer, and the ranks; a private training that they are in has ended."""
    try:
        check_objects(request.module, request.optimizer, request.data_loader)
    except ArgumentError:  # told in a moment, on all ranks
        return replace(request, ranks=Ranks.of(request.module))
    request = as_trained(request)
    module = end_earlier(request.module)
    optimizer = getattr(request.optimizer, "original_optimizer", request.optimizer)
    ranks, loader = Ranks.of(module), request.data_loader
    if request.privacy.poisson_sampling is not False:  # what is no boolean is told in a moment
        loader = for_all_ranks(loader, ranks)
    return replace(request, module=module, optimizer=optimizer, data_loader=loader, ranks=ranks)


def end_earlier(module: nn.Module) -> nn.Module:
    """End a private training that this model is already in.

    Args:
        module: a model, or the wrapper of an earlier call.

    Returns:
        The plain model.
    """
    while isinstance(module, AbstractGradSampleModule):
        module = module.to_standard_module()
    earlier = in_training.holder_of(module)
    if earlier is not None:
        earlier.cleanup()
    return module
