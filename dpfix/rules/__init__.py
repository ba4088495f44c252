"""The rules, in the order in which they look and repair.

A rule is one file with one subclass of :class:`~dpfix.rules.rule.Rule`, and one line in :data:`RULES`, which hands out
its number. ``python -m docs.generate_rules`` then writes its page.
"""

from __future__ import annotations

from dpfix.rules.batch_norm import BatchNorm
from dpfix.rules.compiled import Compiled
from dpfix.rules.data_loader import LoaderFits
from dpfix.rules.distributed import Distributed
from dpfix.rules.embedding import EmbeddingOptions
from dpfix.rules.eval_mode import EvalMode
from dpfix.rules.inplace import InPlace
from dpfix.rules.instance_norm import InstanceNorm
from dpfix.rules.optimizer import OptimizerFits
from dpfix.rules.parameter_dtype import ParameterDtype
from dpfix.rules.replaceable import Replaceable
from dpfix.rules.rule import Rule, numbered
from dpfix.rules.scripted import Scripted

RULES: tuple[Rule, ...] = numbered(
    DPF005=Scripted,
    DPF006=Compiled,
    DPF019=Distributed,
    DPF004=EvalMode,
    DPF001=BatchNorm,
    DPF002=InstanceNorm,
    DPF003=InPlace,
    DPF007=Replaceable,
    DPF008=EmbeddingOptions,
    DPF009=ParameterDtype,
    DPF010=OptimizerFits,
    DPF011=LoaderFits,
)
"""Every rule, in order."""

__all__ = ["RULES", "Rule"]
