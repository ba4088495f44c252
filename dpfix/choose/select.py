"""Choosing the engine: those that pass the audit are timed, and the fastest is kept; batches of one where none passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from dpfix.audit.clipped_sum import SLACK, check_engine
from dpfix.audit.reference import Trials
from dpfix.choose import plan_cache, timing
from dpfix.engines import BY_NAME, ENGINES, Engine
from dpfix.errors import NoEngineError
from dpfix.instrument.source import describe_module
from dpfix.observe.provoke import SCALED
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.report.finding import Finding
from dpfix.report.report import EngineEvidence, Proof
from dpfix.scan.options import PerformanceOptions

BUDGET_SECONDS = 3.0
"""Once an engine has passed, further ones are tried for this long."""

MATERIALISED_BYTES = 2**28
"""Per-sample gradients of a whole batch may take this much memory, where an engine passed that keeps none."""

ENOUGH = 2
"""Engines that passed, after which those of Opacus are not tried."""

SMALLEST_MEASURED = 2
"""Samples in the smaller one of two batches whose memory is measured, at least."""

_NOT_TRIED = "not tried"
_CANNOT_GIVE_WAY = (
    f"{_NOT_TRIED}, it could not give way if the loop called the model in another way (training_step= tells it), or trained "
    "parameters that no gradient has reached"
)


def engines_for(mode: str, plan: Plan) -> tuple[Engine, ...]:
    """The engines to try for a ``grad_sample_mode``: all that are possible for ``"auto"``, the named one otherwise."""
    if mode == "auto":
        return tuple(e for e in ENGINES.values() if not (plan.own_engines and e.attached_by_opacus))
    return (BY_NAME[mode],)


def choose(
    subject: Subject,
    trials: Trials,
    plan: Plan,
    options: PerformanceOptions,
    batch_size: float,
    chosen_by_rank_0: str = "",
) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """Audit the candidates, time those that pass, keep the fastest that also passes on the harder probes.

    Args:
        plan: everything about the training but the engine.
        options: ``grad_sample_mode`` of the call; whether to remember the order of the engines, and to use what is
            remembered.
        chosen_by_rank_0: the only candidate, on the other ranks.

    Returns:
        The plan with its engine, and the evidence for every candidate.

    Raises:
        NoEngineError: no candidate reproduced the reference.
    """
    mode = chosen_by_rank_0 or options.grad_sample_mode
    if mode != "auto" and not BY_NAME[mode].audited:
        reason = "asked for by name; what the script computes itself is not audited"
        return plan.with_engine(BY_NAME[mode]), (EngineEvidence(mode, passed=False, reason=reason),)
    search = _Search(subject, trials, plan, options, batch_size)
    candidates = engines_for(mode, plan)
    evidence: dict[str, EngineEvidence] = {}
    others = ENGINES.keys() - {e.name for e in candidates} if mode == "auto" else ()
    with _quiet():
        for resort in (False, True):  # one of last resort only where all others fail
            chosen = search.best([e for e in candidates if e.last_resort is resort], evidence)
            if chosen is not None:
                why = f"{_NOT_TRIED}, it is the last resort and `{chosen.engine}` is right"
                left = {e.name: EngineEvidence(e.name, passed=False, reason=why) for e in candidates}
                left |= {name: EngineEvidence(name, passed=False, reason=_CANNOT_GIVE_WAY) for name in sorted(others)}
                return chosen, tuple((left | evidence).values())
    problem = trials.ordinary.record.layout_problem
    raise NoEngineError(_nothing_passed(subject.module, mode, options, tuple(evidence.values()), problem))


@dataclass(frozen=True)
class _Search:
    """The search for the best of some engines; see :func:`choose` for the attributes."""

    subject: Subject
    trials: Trials
    plan: Plan
    options: PerformanceOptions
    batch_size: float

    def best(self, candidates: Sequence[Engine], evidence: dict[str, EngineEvidence]) -> Plan | None:
        """The plan with the fastest engine that passes on all probes, if there is one; writes the evidence for each."""
        subject, ordinary, plan = self.subject, self.trials.ordinary, self.plan
        known, key, seconds = None, "", dict[str, float]()
        cached = self.options.cache and len(candidates) > 1 and all(e.remembered for e in candidates)
        if cached:
            key = self._key(candidates)
            known = plan_cache.remembered(key)
        if known is not None and next(iter(known)) in {e.name for e in candidates}:
            best = next(iter(known))
            why = f"{_NOT_TRIED}, `{best}` was faster when this model was timed before"
            evidence |= {e.name: EngineEvidence(e.name, passed=False, reason=why) for e in candidates}
            evidence |= self._timed(self._try((BY_NAME[best],)), known)
        else:
            evidence |= self._try(candidates)
        passed = [e for e in candidates if evidence[e.name].passed]
        if len(passed) > 1:
            seconds = timing.in_order(passed, subject, ordinary.samples, plan, self.batch_size)
            evidence |= self._timed(evidence, seconds)
            passed = [BY_NAME[n] for n in seconds]
            if cached:
                plan_cache.remember(key, seconds)
        untried = [e for e in candidates if evidence[e.name].reason.startswith(_NOT_TRIED)]
        for engine in (*passed, *untried):
            if engine in untried:  # those that passed first fail on the harder probes
                evidence |= self._try((engine,))
                if not evidence[engine.name].passed:
                    continue
            confirmed = _confirm(engine, subject, self.trials, plan, self.options)
            problem = next((e for e in confirmed if not e.passed), None)
            if problem is None:
                if seconds and engine in passed:
                    evidence[engine.name] = self._with_memory(engine, evidence[engine.name])
                return plan.with_engine(engine)
            evidence[engine.name] = problem
        return None

    def _try(self, engines: Sequence[Engine]) -> dict[str, EngineEvidence]:
        """The evidence of the engines, one after the other."""
        subject, trial = self.subject, self.trials.ordinary
        kept = self.batch_size * sum(p.nbytes for p in subject.trained().values())
        evidence: dict[str, EngineEvidence] = {}
        start = time.perf_counter()
        for engine in engines:
            passed = [BY_NAME[e.engine] for e in evidence.values() if e.passed]
            reason = ""
            if passed and time.perf_counter() - start > BUDGET_SECONDS:
                reason = f"{_NOT_TRIED}, {BUDGET_SECONDS:.0f} s were spent on engines that passed"
            elif engine.attached_by_opacus and len(passed) >= ENOUGH:
                reason = f"{_NOT_TRIED}, {' and '.join(f'`{e.name}`' for e in passed)} are right"
            elif engine.materialises and kept > MATERIALISED_BYTES and any(not e.materialises for e in passed):
                reason = f"{_NOT_TRIED}, it would keep {kept / 1e9:.1f} GB of gradients in a step, and one that passed keeps none"
            elif not (verdict := engine.supports(subject.module, trial.record)):
                reason = verdict.reason
            evidence[engine.name] = (
                EngineEvidence(engine.name, passed=False, reason=reason)
                if reason
                else check_engine(engine, subject, trial, self.plan)
            )
        return evidence

    def _with_memory(self, engine: Engine, evidence: EngineEvidence) -> EngineEvidence:
        """The evidence with the memory of a step, and of a smaller one: it grows in a straight line."""
        size = timing.timed_size(self.batch_size)
        smaller = size // 2

        def held(samples: int) -> int | None:
            return timing.held(engine, self.subject, self.trials.ordinary.samples, self.plan, samples)

        whole, half = held(size), held(smaller) if smaller >= SMALLEST_MEASURED else None
        each = None if whole is None or half is None else max(0.0, (whole - half) / (size - smaller))
        return replace(evidence, memory=whole, memory_per_sample=each)

    def _timed(self, evidence: Mapping[str, EngineEvidence], seconds: Mapping[str, float]) -> dict[str, EngineEvidence]:
        """The evidence of those that passed, with their times."""
        size = timing.timed_size(self.batch_size)
        return {
            n: replace(e, seconds=seconds[n], samples=size) if e.passed and n in seconds else e
            for n, e in evidence.items()
        }

    def _key(self, candidates: Sequence[Engine]) -> str:
        """What the order of the engines is remembered under."""
        plan = self.plan
        return plan_cache.key(
            self.subject.module,
            self.trials.ordinary.samples.of_size(timing.timed_size(self.batch_size)),
            plan=replace(plan, no_grad_regions=()),
            candidates=[e.name for e in candidates],
            size=self.batch_size,
            regions=[(r.site, r.of) for r in plan.no_grad_regions],
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Engines that are only being tried must not warn the user about layers they may never train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _confirm(
    engine: Engine, subject: Subject, trials: Trials, plan: Plan, options: PerformanceOptions
) -> Iterator[EngineEvidence]:
    """The harder probes, and on the last of them (an outlier is in it, where there is one) the bound.

    At the clip norm that clips every sample: there an outlier does not drown the others. Rounding is larger than on the
    ordinary probe, while what goes wrong with the data of one sample is as large as its gradient.
    """
    if plan.no_grad_regions and options.grad_sample_mode == "auto":
        # a region that is given up while training must leave an engine that is right
        yield check_engine(engine, subject, trials.ordinary, replace(plan, no_grad_regions=()))
    tried = trials.harder or (trials.ordinary,)
    for trial in tried:
        left_out = min(SCALED, len(trial.samples) - 1) if trial is tried[-1] else None
        yield check_engine(engine, subject, trial, plan, trial.wanted.clip_norms[:1], left_out)


def proofs(plan: Plan, evidence: tuple[EngineEvidence, ...], trials: Trials) -> list[Proof]:
    """What was shown about the chosen engine, for the report."""
    chosen = next(e for e in evidence if e.engine == plan.engine)
    if chosen.max_error is None:
        return [Proof("", "exact: not shown, the script computes per-sample gradients itself")]
    ordinary, harder = trials.ordinary, trials.harder
    tolerance = ordinary.wanted.tolerance
    proofs = [
        Proof(
            "exact",
            f"the clipped sum of {len(ordinary.samples)} samples equals the batch-of-one reference at 3 clip norms, largest "
            f"relative error {chosen.max_error:.1e} (allowed {tolerance:.0e})",
            "what the engine would release, and the sum of plain gradients of one sample at a time, each clipped",
            {"samples": len(ordinary.samples), "largest relative error": chosen.max_error, "allowed": tolerance},
        ),
        Proof(
            "bounded",
            f"leaving a sample out moves the clipped sum by at most {1 + SLACK:g} times the clip norm",
            "the clipped sums with the sample and without it",
            {"allowed, in clip norms": 1 + SLACK},
        ),
    ]
    if harder:
        proofs.append(
            Proof(
                "exact",
                f"the same on {len(harder)} harder probe(s): an empty mask, a rare label, a sample scaled by 50, as far as the "
                "samples have such values and the step takes them",
                "as above, on samples that were made harder",
                {"probes": len(harder)},
            )
        )
    return proofs


def _nothing_passed(
    module: nn.Module, mode: str, options: PerformanceOptions, evidence: Sequence[EngineEvidence], layout_problem: str
) -> Finding:
    asked = "" if mode == "auto" else f" (grad_sample_mode='{mode}' was asked for)"
    if mode != options.grad_sample_mode:
        asked = f" (rank 0 chose {mode!r}, and all ranks train with one engine)"
    help = (
        "check that training_step makes the calls your loop makes, through the model itself, and that no penalty on "
        "weights is part of the loss (use weight_decay)."
        if options.grad_sample_mode == "auto"
        else "leave grad_sample_mode at 'auto'."
    )
    if layout_problem:
        help = (
            "give every sample a place of its own in dimension 0: samples of different sizes (graphs, point sets) padded to "
            "[samples, size, ...] with a mask, or as a list with one entry per sample that forward goes through."
        )
    return Finding.refusal(
        "DPF016",
        f"no engine reproduces the batch-of-one reference for {describe_module(module, '')}{asked}.",
        "".join(f"\n        {e.engine}: {e.reason}" for e in evidence),
        help,
        path="training_step" if options.grad_sample_mode == "auto" else "grad_sample_mode",
    )
