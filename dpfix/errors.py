"""The exceptions and warnings of dpfix.

::

    DPFixError                      everything dpfix refuses
    ├── ArgumentError               a value of the call (also a ValueError)
    │   └── UnknownArgumentError    a keyword that does not exist (also a TypeError)
    ├── ModelError                  the model cannot be made private as it is
    │   ├── CoupledModelError       the model mixes the samples of a batch
    │   ├── StateWrittenError       the training step writes sample-dependent state that would leave without noise
    │   └── NoEngineError           no engine reproduced the batch-of-one reference
    ├── LossError                   the loss is not a mean (or sum) over samples
    │   └── CoupledLossError        one sample's share of the loss depends on another sample
    ├── OptimizerError              optimizer and model do not belong together
    ├── LoaderError                 the data loader cannot be sampled as the accountant assumes
    ├── SegmentationError           probabilities, labels or regions that do not fit together
    ├── TrainingStepError           how a batch becomes a loss is unknown, or that step itself fails
    ├── BudgetError                 the budget of the data is spent, or its file cannot be used (also a RuntimeError)
    ├── RankError                   one of several processes cannot train, or does not train the same (also a RuntimeError)
    ├── CheckpointError             a checkpoint does not fit the model (also a RuntimeError)
    │   ├── UnusedKeysError         keys of the checkpoint that the model has no place for
    │   ├── MissingKeysError        weights of the model that the checkpoint does not have
    │   ├── ShapeMismatchError      a weight of another shape
    │   ├── NotConvertibleError     the model cannot compute what the checkpoint's model computed
    │   └── MissingFileError        there is no such file (also a FileNotFoundError)
    └── MisuseError                 the training loop breaks an assumption (also a RuntimeError)
        ├── AccumulationError       several backward passes before one step (also a ValueError)
        ├── ForeignBatchError       a batch that the private loader did not draw
        ├── NonFiniteGradientError  the clipped sum is not finite
        ├── NoiseError              a release without the noise that is accounted
        └── PlanBrokenError         model or optimizer are no longer those that were audited

    DPFixWarning                    base of all warnings
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from opacus.validators.errors import UnsupportedModuleError

from dpfix.report.finding import Finding, Fixability, Severity


class DPFixError(Exception):
    """Base class of everything that dpfix refuses.

    A refusal is a finding: the text of the error, the JSON and the HTML of a diagnosis are made of its fields.

    Args:
        refused: the finding, several of them, or the fact in words: one sentence with value and place.
        why: the reason it matters, if the fact is given in words.
        help: the way out for the user.
        path: module path, parameter name or argument that it is about.

    Attributes:
        findings: what is refused, never empty.
        code: code of a refusal of this class that is given in words.
    """

    code: ClassVar[str] = "DPF100"

    def __init__(
        self, refused: str | Finding | Sequence[Finding], why: str = "", help: str = "", *, path: str = ""
    ) -> None:
        if isinstance(refused, str):
            super().__init__(" ".join(part for part in (refused, why, help) if part))
            severity, fixability = Severity.BREAKS_GUARANTEE, Fixability.REFUSED
            self.findings = (Finding(self.code, severity, fixability, refused, why, help=help, path=path),)
            return
        self.findings = (refused,) if isinstance(refused, Finding) else tuple(refused)
        super().__init__("\n".join(map(str, self.findings)))


class ArgumentError(DPFixError, ValueError):
    """An argument of the call has a value that cannot be used."""

    code = "DPF101"


class UnknownArgumentError(DPFixError, TypeError):
    """A keyword argument that neither dpfix nor Opacus knows."""

    code = "DPF102"


class ModelError(DPFixError, UnsupportedModuleError):
    """The model cannot be made private as it is."""

    code = "DPF103"


class CoupledModelError(ModelError):
    """The model lets one sample's output depend on another sample of the batch."""

    code = "DPF013"


class StateWrittenError(ModelError):
    """The forward pass writes state that depends on the samples and would leave without noise."""

    code = "DPF012"


class NoEngineError(ModelError):
    """No engine reproduced the batch-of-one reference."""

    code = "DPF016"


class LossError(DPFixError, ValueError):
    """The loss is not the mean (or sum) over samples that the call says it is."""

    code = "DPF104"


class CoupledLossError(LossError):
    """One sample's share of the loss depends on another sample of the batch."""

    code = "DPF014"


class OptimizerError(DPFixError, ValueError):
    """The optimizer does not fit the model, or cannot be made private."""

    code = "DPF105"


class LoaderError(DPFixError, ValueError):
    """The data loader cannot be sampled the way the accountant assumes."""

    code = "DPF106"


class SegmentationError(DPFixError, ValueError):
    """Probabilities, labels or regions are not what they are taken for, or do not fit together."""

    code = "DPF107"


class TrainingStepError(DPFixError, ValueError):
    """How a batch becomes a loss is unknown, or the training step itself fails."""

    code = "DPF108"


class RankError(DPFixError, RuntimeError):
    """One of the processes that train a model together cannot go on, or does not train the same thing as the others."""

    code = "DPF109"


class BudgetError(DPFixError, RuntimeError):
    """The budget of the data does not allow a release, or its file cannot be used."""

    code = "DPF052"


class CheckpointError(DPFixError, RuntimeError):
    """A checkpoint does not fit the model."""

    code = "DPF110"


class UnusedKeysError(CheckpointError):
    """Keys of the checkpoint that the model has no place for."""

    code = "DPF111"


class MissingKeysError(CheckpointError):
    """Weights of the model that the checkpoint does not have."""

    code = "DPF112"


class ShapeMismatchError(CheckpointError):
    """A weight has another shape than the model's."""

    code = "DPF113"


class NotConvertibleError(CheckpointError):
    """The model cannot compute what the checkpoint's model computed, whatever its weights are."""

    code = "DPF114"


class MissingFileError(CheckpointError, FileNotFoundError):
    """There is no checkpoint of that name."""

    code = "DPF040"


class MisuseError(DPFixError, RuntimeError):
    """The training loop does something that breaks the guarantee."""

    code = "DPF120"


class AccumulationError(MisuseError, ValueError):
    """Several backward passes, or several draws, would be released in one step."""

    code = "DPF121"


class ForeignBatchError(MisuseError):
    """A step was made with rows that the private loader did not draw."""

    code = "DPF122"


class NonFiniteGradientError(MisuseError):
    """The clipped sum is not finite."""

    code = "DPF123"


class NoiseError(MisuseError):
    """What is about to be released does not hold the noise that is accounted, or holds noise that was released before."""

    code = "DPF035"


class PlanBrokenError(MisuseError):
    """Model or optimizer are no longer the ones that were audited."""

    code = "DPF124"


USER_CODE_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
"""What the user's code (model, loss, dataset) raises for data that it cannot take."""


class DPFixWarning(UserWarning):
    """Base class of every warning that dpfix gives."""
