"""The exceptions and warnings of dpfix.

::

    DPFixError                      everything dpfix refuses
    ├── ArgumentError               a value of the call (also a ValueError)
    │   └── UnknownArgumentError    a keyword that does not exist (also a TypeError)
    ├── ModelError                  the model cannot be made private as it is
    │   ├── CoupledModelError       the model mixes the samples of a batch
    │   ├── StateWrittenError       forward writes sample-dependent state that would leave without noise
    │   └── NoEngineError           no engine reproduced the batch-of-one reference
    ├── LossError                   the loss is not a mean (or sum) over samples
    │   └── CoupledLossError        one sample's share of the loss depends on another sample
    ├── OptimizerError              optimizer and model do not belong together
    ├── LoaderError                 the data loader cannot be sampled as the accountant assumes
    ├── SegmentationError           probabilities, labels or regions that do not fit together
    ├── TrainingStepError           how a batch becomes a loss is unknown, or that step itself fails
    ├── RankError                   one of several processes cannot train, or does not train the same (also a RuntimeError)
    ├── CheckpointError             a checkpoint does not fit the model (also a RuntimeError)
    │   ├── UnusedKeysError         keys of the checkpoint that the model has no place for
    │   ├── MissingKeysError        weights of the model that the checkpoint does not have
    │   ├── ShapeMismatchError      a weight of another shape
    │   └── NotConvertibleError     the model cannot compute what the checkpoint's model computed
    └── MisuseError                 the training loop breaks an assumption (also a RuntimeError)
        ├── AccumulationError       several backward passes before one step (also a ValueError)
        ├── ForeignBatchError       a batch that the private loader did not draw
        ├── NonFiniteGradientError  the clipped sum is not finite
        └── PlanBrokenError         model or optimizer are no longer those that were audited

    DPFixWarning                    base of all warnings
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opacus.validators.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from dpfix.report.finding import Finding


class DPFixError(Exception):
    """Base class of everything that dpfix refuses.

    Attributes:
        findings: the findings that led to the refusal, if it came from a scan or an audit.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class ArgumentError(DPFixError, ValueError):
    """An argument of the call has a value that cannot be used."""


class UnknownArgumentError(DPFixError, TypeError):
    """A keyword argument that neither dpfix nor Opacus knows."""


class ModelError(DPFixError, UnsupportedModuleError):
    """The model cannot be made private as it is."""


class CoupledModelError(ModelError):
    """The model lets one sample's output depend on another sample of the batch."""


class StateWrittenError(ModelError):
    """The forward pass writes state that depends on the samples and would leave without noise."""


class NoEngineError(ModelError):
    """No engine reproduced the batch-of-one reference."""


class LossError(DPFixError, ValueError):
    """The loss is not the mean (or sum) over samples that the call says it is."""


class CoupledLossError(LossError):
    """One sample's share of the loss depends on another sample of the batch."""


class OptimizerError(DPFixError, ValueError):
    """The optimizer does not fit the model, or cannot be made private."""


class LoaderError(DPFixError, ValueError):
    """The data loader cannot be sampled the way the accountant assumes."""


class SegmentationError(DPFixError, ValueError):
    """Probabilities, labels or regions are not what they are taken for, or do not fit together."""


class TrainingStepError(DPFixError, ValueError):
    """How a batch becomes a loss is unknown, or the training step itself fails."""


class RankError(DPFixError, RuntimeError):
    """One of the processes that train a model together cannot go on, or does not train the same thing as the others."""


class CheckpointError(DPFixError, RuntimeError):
    """A checkpoint does not fit the model."""


class UnusedKeysError(CheckpointError):
    """Keys of the checkpoint that the model has no place for."""


class MissingKeysError(CheckpointError):
    """Weights of the model that the checkpoint does not have."""


class ShapeMismatchError(CheckpointError):
    """A weight has another shape than the model's."""


class NotConvertibleError(CheckpointError):
    """The model cannot compute what the checkpoint's model computed, whatever its weights are."""


class MisuseError(DPFixError, RuntimeError):
    """The training loop does something that breaks the guarantee."""


class AccumulationError(MisuseError, ValueError):
    """Several backward passes, or several draws, would be released in one step."""


class ForeignBatchError(MisuseError):
    """A step was made with rows that the private loader did not draw."""


class NonFiniteGradientError(MisuseError):
    """The clipped sum is not finite."""


class PlanBrokenError(MisuseError):
    """Model or optimizer are no longer the ones that were audited."""


class DPFixWarning(UserWarning):
    """Base class of every warning that dpfix gives."""
