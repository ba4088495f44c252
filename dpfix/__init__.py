"""dpfix: one call that makes a PyTorch model train under differential privacy.

The whole public API is what this file exports.
"""

from dpfix.api import (
    SafePrivacyEngine,
    diagnose,
    make_private_safe,
    make_private_safe_with_epsilon,
)
from dpfix.errors import (
    AccumulationError,
    ArgumentError,
    CoupledLossError,
    CoupledModelError,
    DPFixError,
    DPFixWarning,
    ForeignBatchError,
    LoaderError,
    LossError,
    MisuseError,
    ModelError,
    NoEngineError,
    NonFiniteGradientError,
    OptimizerError,
    PlanBrokenError,
    SegmentationError,
    StateWrittenError,
    TrainingStepError,
    UnknownArgumentError,
)
from dpfix.findings import EngineEvidence, Finding, Fixability, Report, Severity
from dpfix.losses import PerSampleLoss
from dpfix.plan import Plan
from dpfix.statement import PrivacyStatement
from dpfix.training import PrivateTraining
from dpfix.weights import Difference, EquivalenceReport, verify_equivalence

__version__ = "0.1.0"

__all__ = [
    "AccumulationError",
    "ArgumentError",
    "CoupledLossError",
    "CoupledModelError",
    "DPFixError",
    "DPFixWarning",
    "Difference",
    "EngineEvidence",
    "EquivalenceReport",
    "Finding",
    "Fixability",
    "ForeignBatchError",
    "LoaderError",
    "LossError",
    "MisuseError",
    "ModelError",
    "NoEngineError",
    "NonFiniteGradientError",
    "OptimizerError",
    "PerSampleLoss",
    "Plan",
    "PlanBrokenError",
    "PrivacyStatement",
    "PrivateTraining",
    "Report",
    "SafePrivacyEngine",
    "SegmentationError",
    "Severity",
    "StateWrittenError",
    "TrainingStepError",
    "UnknownArgumentError",
    "diagnose",
    "make_private_safe",
    "make_private_safe_with_epsilon",
    "verify_equivalence",
]
