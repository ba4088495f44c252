"""Statistics that a batch normalisation has tracked, carried over into weight and bias of what takes its place."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm


def can_fold(module: _BatchNorm) -> bool:
    """Whether a layer has statistics, and weight and bias to carry them over into."""
    return all(t is not None for t in (module.running_mean, module.running_var, module.weight, module.bias))


def fold(module: _BatchNorm, groups: int) -> None:
    """Change weight and bias so that a group normalisation with them computes about what the layer did in ``eval()``.

    A group normalisation takes off a group's mean and divides by its standard deviation, those of one sample. What they are on
    average follows from the mean and the variance of the group's channels, so that no data is needed. The larger the
    groups, the nearer both are to their averages in every sample.

    Args:
        module: a layer that :func:`can_fold`; its parameters get new values in new memory.
        groups: number of groups.
    """
    mean, variance = (t.detach().double() for t in (module.running_mean, module.running_var))  # type: ignore[union-attr]
    deviation = (variance + module.eps).sqrt()
    by_group = mean.reshape(groups, -1)
    within = (variance + mean.square()).reshape(groups, -1).mean(1) - by_group.mean(1).square() + module.eps
    size = by_group.shape[1]
    group_mean = by_group.mean(1).repeat_interleave(size)
    gain = module.weight.detach().double() / deviation
    shift = module.bias.detach().double() + gain * (group_mean - mean)
    scale = gain * within.sqrt().repeat_interleave(size)
    for parameter, value in ((module.weight, scale), (module.bias, shift)):
        parameter.data = value.to(parameter.dtype)


def shares_weights(module: _BatchNorm, others: list[_BatchNorm]) -> bool:
    """Whether another layer has the same weight or bias, which cannot hold the statistics of both."""
    own = {id(p) for p in (module.weight, module.bias)}
    return any(other is not module and own & {id(other.weight), id(other.bias)} for other in others)
