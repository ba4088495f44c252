"""dpfix: one call that makes a PyTorch model train under differential privacy.

The whole public API is what this file exports.
"""

from dpfix.api import (
    SafePrivacyEngine,
    diagnose,
    make_private_safe,
    make_private_safe_with_epsilon,
)
from dpfix.engines.per_sample.function import per_sample_gradients
from dpfix.errors import (
    AccumulationError,
    ArgumentError,
    BudgetError,
    CheckpointError,
    CoupledLossError,
    CoupledModelError,
    DPFixError,
    DPFixWarning,
    ForeignBatchError,
    LoaderError,
    LossError,
    MissingFileError,
    MissingKeysError,
    MisuseError,
    ModelError,
    NoEngineError,
    NoiseError,
    NonFiniteGradientError,
    NotConvertibleError,
    OptimizerError,
    PlanBrokenError,
    RankError,
    SegmentationError,
    ShapeMismatchError,
    StateWrittenError,
    TrainingStepError,
    UnknownArgumentError,
    UnusedKeysError,
)
from dpfix.plan import Plan
from dpfix.repair.joined_optimizer import JoinedOptimizer
from dpfix.repair.per_sample_loss import PerSampleLoss
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Layer, Proof, Report
from dpfix.report.statement import PrivacyStatement
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.training.budget import Budget
from dpfix.training.certificate_check import CertificateCheck, verify_certificate
from dpfix.training.planning import PlannedTraining, TrainingPlans, plan
from dpfix.training.result import PrivateTraining
from dpfix.weights import (
    Difference,
    EquivalenceReport,
    LegacyReport,
    LoadReport,
    Recording,
    changed_layers,
    export_plain,
    load_pretrained,
    plain_state_dict,
    save_plain,
    verify_equivalence,
    verify_legacy,
)

__version__ = "0.1.0"

__all__ = [
    "AccumulationError",
    "ArgumentError",
    "AugmentationMultiplicity",
    "Budget",
    "BudgetError",
    "CertificateCheck",
    "CheckpointError",
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
    "JoinedOptimizer",
    "Layer",
    "LegacyReport",
    "LoadReport",
    "LoaderError",
    "LossError",
    "MissingFileError",
    "MissingKeysError",
    "MisuseError",
    "ModelError",
    "NoEngineError",
    "NoiseError",
    "NonFiniteGradientError",
    "NotConvertibleError",
    "OptimizerError",
    "PerSampleLoss",
    "Plan",
    "PlanBrokenError",
    "PlannedTraining",
    "PrivacyStatement",
    "PrivateTraining",
    "Proof",
    "RankError",
    "Recording",
    "Report",
    "SafePrivacyEngine",
    "SegmentationError",
    "Severity",
    "ShapeMismatchError",
    "StateWrittenError",
    "TrainingPlans",
    "TrainingStepError",
    "UnknownArgumentError",
    "UnusedKeysError",
    "changed_layers",
    "diagnose",
    "export_plain",
    "load_pretrained",
    "make_private_safe",
    "make_private_safe_with_epsilon",
    "per_sample_gradients",
    "plain_state_dict",
    "plan",
    "save_plain",
    "verify_certificate",
    "verify_equivalence",
    "verify_legacy",
]
