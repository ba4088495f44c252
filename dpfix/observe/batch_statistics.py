"""Which modules mix the samples of the probe by a call of ``batch_norm``."""

from __future__ import annotations

from collections.abc import Mapping

from dpfix.errors import TrainingStepError
from dpfix.instrument.batch_norm_calls import Mixing, mixing_calls
from dpfix.instrument.module_state import traceless
from dpfix.observe.failures import described_failures
from dpfix.observe.probe import Probe
from dpfix.observe.training_step import Subject


def mixing_modules(subject: Subject, probe: Probe, norm: str) -> Mapping[str, Mixing]:
    """Run the forward pass of the step on the probe and look for such calls.

    Args:
        norm: what each of them computes meanwhile; see :class:`~dpfix.scan.options.PrivacyOptions`.

    Returns:
        What was seen of every module that makes one, by path.
    """
    paths = {module: path for path, module in subject.module.named_modules()}
    try:
        with traceless(subject.module), described_failures(subject.step), mixing_calls(norm) as found:
            subject.loss(probe.batch)
    except TrainingStepError:
        return {}  # it does not run for another reason
    return {paths[module]: Mixing.of(calls, norm) for module, calls in found.items() if module in paths}
