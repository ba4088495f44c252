"""What is released is a sum of clipped per-sample gradients, proven on real steps (:mod:`dpfix.training.follow`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.engines import UNDECIDED, engine_of
from dpfix.errors import USER_CODE_ERRORS, CoupledLossError, DPFixError, PlanBrokenError
from dpfix.instrument.freed_memory import give_back
from dpfix.instrument.function_modes import switch_off
from dpfix.instrument.source import calling_line, describe_module, warn_user
from dpfix.training.follow import messages
from dpfix.training.follow.agenda import Agenda, Novelty
from dpfix.training.follow.beside import (
    Inside,
    Settings,
    attribute_of_batch,
    numbers_of_model,
    numbers_read,
    settings_of,
)
from dpfix.training.follow.calls import LIKE, ModelCall, line_of, parts_of
from dpfix.training.follow.due_sum import norms_left_on, wrong_sum
from dpfix.training.follow.follower import Follower
from dpfix.training.follow.gradient_reads import GradientReads
from dpfix.training.follow.judge import Coupling, coupled, exchanges, other_reduction, replacements
from dpfix.training.follow.model import PlainModel
from dpfix.training.follow.numbers import NumberWatch
from dpfix.training.follow.outside import Outside, Strangers, comes_from, fed_with
from dpfix.training.follow.replay import Replay, path_to
from dpfix.training.follow.step import NotFollowedError, RealStep, Way, other_shapes
from dpfix.training.follow.told import ToldStep
from dpfix.training.guards.check import Check, Guarded
from dpfix.training.guards.following import Following
from dpfix.training.guards.ranks import any_looks

T = TypeVar("T")


class RealSteps(Check):
    """On checked steps: nobody else's data matters to a sample, and the clipped sum is that of ordinary autograd.

    Catches: a loss, a model or a loop that couples samples on real data, at whatever step it begins; numbers of the batch that
    scale the loss; state of earlier batches; parameters outside the model that learn from it; an engine that is wrong on
    this data. Costs: writing down the functions between delivery and ``backward()``; a few steps' time for a checked step.

    Args:
        guarded: the training.
        following: what is known about its steps.

    Attributes:
        following: see above.
        agenda: says which steps are checked.
        outside: parameters outside the model that learn from the loss.
    """

    def __init__(self, guarded: Guarded, following: Following) -> None:
        self._guarded, self.following = guarded, following
        engine = engine_of(guarded.plan)
        self.needed = engine.audited or engine is UNDECIDED  # the step that decides is followed from its delivery on
        self.agenda = Agenda(0.75 * following.share)
        self._novelty, self._numbers, self._strangers = Novelty(), NumberWatch(), Strangers()
        self._settings, self._model_numbers = Settings(), Settings(numbers_of_model(guarded.module, ()))
        self.outside = Outside(tuple(guarded.module.parameters()))
        self._warned, self._unfollowed = False, ""
        self._gradient_reads = GradientReads(guarded.parameters)
        self._looked = self._checked = False
        self._pending: tuple[PlainModel, list[int]] | None = None
        self._waiting: list[tuple[RealStep, Any]] = []  # for the parameters of a spread model to be put together
        self._optimizer: DPOptimizer | None = None
        self._failed: DPFixError | None = None
        if self.needed:
            self._follower = Follower(guarded.module, guarded.plan.followed_calls, following.batches, self._backward)
            self._listen()

    def _listen(self) -> None:
        if self._guarded.ledger is not None:
            self._guarded.ledger.at_delivery = self._follower.deliver
            self._follower.on_draw = self._guarded.ledger.work_on
        self._follower.on_gradient = self._gradient_reads.look
        self._follower.on_abandoned = self._forget
        if self._guarded.own_loader is not None:
            self._guarded.own_loader.at_delivery = self._follower.deliver

    def _forget(self) -> None:
        """What is held of a batch for a look at it in the step."""
        self._pending, self._waiting = None, []

    def draws_of(self, tree: Any) -> set[Any]:
        """The draws whose batches are known to be in the arguments of a call, however the loop has changed them."""
        return {delivery.draw for delivery in self._follower.deliveries_in(*tree)} if self.needed else set()

    # -------------------------------------------------------------- moments

    @override
    def cleared(self) -> None:
        self._failed, self._unfollowed = None, ""
        self._forget()
        if self._follower.over:
            switch_off(self._follower)  # after a refusal inside backward() it could not be taken off at once

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        self._optimizer = optimizer
        self._follower.pause()
        self._look_at_waiting(optimizer)
        if self._failed is not None:
            raise self._failed
        self._look_at_settings(optimizer)
        models = [c for c in self._follower.calls if isinstance(c, ModelCall) and c.outputs]
        if models and not self._looked and max(c.samples for c in models) > 1:
            otherwise = "backward() was not called on a tensor, but on several or by autograd.grad"
            self._not_followed(self._follower.broken or otherwise)

    @override
    def summed(self, norms: torch.Tensor | None) -> None:
        self._say_what_was_not_followed()
        pending, self._pending = self._pending, None
        optimizer, guarded = self._optimizer, self._guarded
        if pending is None or optimizer is None or guarded.progress.partial or not optimizer.by_scheme:  # type: ignore[attr-defined]
            return
        norms = norms_left_on(guarded.parameters, guarded.plan.clipping) if norms is None else norms
        model, chosen = pending
        if guarded.ledger is not None and guarded.plan.followed_by_row:
            model.counts = guarded.ledger.counts
        if norms is None or len(norms) != model.clipped_as_one:
            return
        clipped = guarded.own_sums()
        with self.agenda.check():
            wrong = wrong_sum(model, guarded.plan, clipped, norms, float(optimizer.max_grad_norm), chosen)
        if wrong:
            guarded.forget_sum()
            guarded.handle.finish()
            raise PlanBrokenError(
                f"engine {guarded.plan.engine} computes another sum for this batch of {guarded.name} than is due: {wrong}.",
                "Nothing was released.",
                "Choose another engine with grad_sample_mode (vmap, microbatch), and report the model.",
                path="grad_sample_mode",
            )

    @override
    def after_step(self, released: bool) -> None:
        self._follower.settle(remember=self._checked)
        if self._checked:
            give_back()
        self._looked, self._checked, self._unfollowed = False, False, ""
        self._forget()

    @override
    def make_way(self) -> None:
        if self.needed:
            self._follower.rest()

    @override
    def take_over(self, earlier: RealSteps) -> None:
        if not (self.needed and earlier.needed):
            return
        self._follower.remove()
        self._follower = earlier._follower
        self._follower.follow(self._guarded.plan.followed_calls, self._backward)
        self._listen()
        self.outside.take_over(earlier.outside)
        self._numbers, self._warned = earlier._numbers, earlier._warned
        self._gradient_reads.told = earlier._gradient_reads.told
        self._settings, self._model_numbers = earlier._settings, earlier._model_numbers

    @override
    def detach(self) -> None:
        if self.needed:
            self._follower.remove()
            self._forget()
        if self._guarded.own_loader is not None:
            self._guarded.own_loader.end()

    # -------------------------------------------------------------- backward

    def _backward(self, loss: torch.Tensor, args: Any, kwargs: Any) -> None:
        """Called by ``loss.backward()``, before any gradient is taken.

        Raises:
            DPFixError: the step must not be released; nothing has moved.
        """
        follower = self._follower
        self._pending = None  # of a step that was refused
        outer = kwargs.get("gradient", args[0] if args else None)
        self.outside.refuse_moved()
        models = [c for c in follower.calls if isinstance(c, ModelCall) and c.outputs]
        if self.outside.look(loss, follower.calls):
            self._look_outside(loss, models)
        if max((c.samples for c in models), default=0) < 2 or self._guarded.stands_in:
            self._looked = bool(models)
            return  # a sample alone, or the stand-in of an empty draw
        self._looked = True
        plan, module = self._guarded.plan, self._guarded.module
        if any(module.get_submodule(path).training for path in plan.fixed_norms):
            return  # a check of its own says so in the step
        if plan.row_counter is not None and not plan.followed_by_row:
            return  # samples with different numbers of rows: the loss had to be told
        if any(c.samples != d.samples for c in models for d in c.deliveries):
            if self._guarded.ledger is not None:
                return  # other rows than were drawn: the step is refused
            follower.forget_deliveries()
        seen = set(follower.seen)
        for delivery in {d for c in models for d in c.deliveries}:
            seen |= self._novelty.of(delivery)
        if not self.agenda.due(seen):
            return
        place, paused = calling_line(), self._guarded.handle.paused
        real = self._tried(lambda: RealStep.of(loss, outer, models, place, paused))
        if real is None or real.samples < 2:
            return
        if self._guarded.shards is None:
            return self._tried(partial(self._check, real))
        self._waiting.append((real, self._guarded.shards.moment()))

    def _tried(self, work: Callable[[], T]) -> T | None:
        """A part of a look at a step: it may fail, which is told, or find that the step must not be released."""
        try:
            with self.agenda.check():
                return work()
        except NotFollowedError as why:
            self._not_followed(str(why))
        except DPFixError as error:
            self._follower.clear()
            switch_off(self._follower)
            if self._guarded.ranks.size == 1:
                raise
            self._failed = error  # the others wait in the step
        except USER_CODE_ERRORS as error:
            self._not_followed(f"repeating it failed ({type(error).__name__}: {error})")
        return None

    def _look_at_waiting(self, optimizer: DPOptimizer) -> None:
        """Steps of a model that is spread: where one process looks at one, all put the parameters together for it."""
        shards, waiting, self._waiting = self._guarded.shards, self._waiting, []
        if shards is None or not any_looks(self._guarded, optimizer, looks=bool(waiting)):
            return
        same = all(moment == shards.moment() for _, moment in waiting)
        if not shards.put_together(keep=bool(waiting) and same) and waiting:
            self._not_followed("the spread model has changed between its call and optimizer.step()")
            return
        for real, _ in waiting:
            self._tried(partial(self._check, real))

    def _look_outside(self, loss: torch.Tensor, models: list[ModelCall]) -> None:
        """Parameters outside that a loss on delivered data teaches; one on a generator's data teaches none."""
        origin, (path, beside) = self._follower.origins(), path_to(loss, self._follower.calls)
        made = [call for number, call in enumerate(path) if number not in beside]
        calls = [call for call in made if isinstance(call, ModelCall) or call.name not in LIKE]
        parts = [part for call in calls for part in parts_of((call.args, call.kwargs))]
        tensors = [loss, *(part for part in parts if isinstance(part, torch.Tensor))]
        earlier, found = self._follower.earlier, self.outside.look(loss, calls)
        if any(id(part) in origin for part in parts) or earlier.has(loss) or fed_with(tensors, earlier):
            with_model = any(isinstance(call, ModelCall) for call in calls)
            if with_model or comes_from(loss, models) or earlier.of_model(loss):
                self.outside.learn(found, with_model=with_model)
            else:
                self.outside.learn_beside(found)

    def _check(self, real: RealStep) -> None:
        guarded, follower, draw = self._guarded, self._follower, self.agenda.draw
        model = PlainModel(guarded.plain_copy(), real)
        way, replay = self._way(real, model)
        model.step = real = real.completed(way.repeat(None))
        found = coupled(way, real, draw, in_order=guarded.plan.followed_by_row)
        if found is not None:
            raise self._refusal(found, real, replay)
        if replay is not None:
            self._look_at_numbers(replay, real)
        self._look_at_lengths(way, replay, real, model)
        calls = replay.calls if replay is not None else path_to(real.loss, follower.calls)[0]
        stranger = bool(real.deliveries) and self._strangers.look(calls, follower)
        if stranger:
            line = "an argument of the model" if stranger is True else line_of(stranger)
            self._not_followed(
                f"it takes a tensor ({line}) that the loop makes anew in every step by a way that is not seen"
            )
        at = follower.earlier.taken_by(calls)
        if at and real.deliveries:  # without a new batch the step is refused as such
            raise messages.kept("" if at is True else line_of(at))
        self._look_beside(real, model)
        mixed = model.mixes(list(replacements(real, draw)))
        if mixed is not None:
            self._failed = messages.coupled_model(mixed[0], describe_module(guarded.module, ""))
            return  # said in the step, unless the model is another than the one that was audited
        gap = model.couples(draw)
        if gap:
            raise messages.coupled_loss(gap, f"computed by {guarded.name} itself; {real.place}")
        other = other_reduction(way, real, guarded.plan.loss_reduction == "mean", replay.calls if replay else ())
        if other:
            raise messages.other_reduction(other, real.place)
        self.agenda.passed()
        self._checked = True
        self._pending = model, draw.sample(range(real.samples), min(2, real.samples))

    def _way(self, real: RealStep, model: PlainModel) -> tuple[Way, Replay | None]:
        """The script's own code, where the loop makes the told step; else what it did, call by call."""
        following = self.following
        if following.step is not None and not self._written(real):
            try:
                return ToldStep(following.step, following.batches, real, self._value, model.module), None
            except NotFollowedError:
                pass
        replay = Replay(self._follower, real)
        return replay, replay

    def _written(self, real: RealStep) -> bool:
        return self._follower.deliveries.written(real.deliveries, self._follower.kept)

    def _value(self, t: torch.Tensor) -> torch.Tensor:
        return self._follower.kept.get(id(t), t)

    def _refusal(self, found: Coupling, real: RealStep, replay: Replay | None) -> DPFixError:
        if found.where == "order":
            return messages.moved_by_loop(self._guarded.name)
        if found.where == "loss":
            return messages.coupled_loss(found.gap, real.place)
        call = real.calls[found.number]
        line = "" if replay is None else replay.line_of_argument(call, found.path)
        return messages.coupled_input(found.gap, messages.argument_name(found.path), line, self._guarded.name)

    def _look_at_numbers(self, replay: Replay, real: RealStep) -> None:
        found = self._numbers.look(replay, real, exchanges(real, self.agenda.draw))
        if found is None:
            return
        line = line_of(found.place) or "an argument of the model"
        if found.sure:
            raise messages.coupled_number(line, real.place)
        self._not_followed(
            f"it is computed with a Python number ({line}) that equals a count or a sum over the batch, or changes from step to "
            "step with numbers that the loop reads from the batch"
        )

    def _look_at_settings(self, optimizer: DPOptimizer) -> None:
        """Settings of the optimizer do not follow the batches; those that never change cost a comparison."""
        values = settings_of(optimizer)
        if self._settings.changed(values) and (
            found := self._settings.follow(values, numbers_read(self._follower.calls))
        ):
            raise messages.setting_follows(found[1])

    def _look_beside(self, real: RealStep, model: PlainModel) -> None:
        """Nothing of the batch reaches the model but by its arguments."""
        follower, module, name = self._follower, self._guarded.module, self._guarded.name
        origin = follower.origins()
        attribute = attribute_of_batch(module, lambda t: id(t) in origin or follower.earlier.has(t))
        if attribute:
            raise messages.reaches_model(f"`{attribute}` holds it", name)
        for call in real.calls:
            inside = Inside(lambda t: id(t) in origin or follower.earlier.has(t), (call.args, call.kwargs))
            model.run(call, inside)
            if inside.found is not None:
                raise messages.reaches_model("a hook, or a function that the model calls, holds it", name)
        found = self._model_numbers.follow(numbers_of_model(module, real.calls), numbers_read(follower.calls))
        if found is not None:
            where, what = found
            raise messages.reaches_model(
                f"the Python number {_named(where, what)}, which it has read from the batch", name
            )

    def _look_at_lengths(self, way: Way, replay: Replay | None, real: RealStep, model: PlainModel) -> None:
        for exchange in exchanges(real, self.agenda.draw):
            if exchange.extreme is not None:
                continue
            try:
                arguments = way.repeat(exchange).arguments
                if replay is not None and not other_shapes(real, arguments):
                    arguments = replay.with_lengths(exchange)
            except NotFollowedError:
                continue
            if other_shapes(real, arguments) and (gap := model.feels_length(exchange, arguments)):
                call = real.calls[0]
                line = "" if replay is None else replay.line_of_argument(call, call.arguments[0][0])
                raise messages.feels_length(gap, line, self._guarded.name)

    def _not_followed(self, why: str) -> None:
        self._unfollowed = self._unfollowed or why

    def _say_what_was_not_followed(self) -> None:
        """Once it is clear that the step is refused for nothing else."""
        why, self._unfollowed = self._unfollowed, ""
        if not why or (self._warned and not self.following.strict):
            return
        text = messages.not_followed(self._guarded.name, why)
        if self.following.strict:
            self._guarded.forget_sum()
            self._guarded.handle.finish()
            raise CoupledLossError(text, "strict=True was asked for.", messages.WAY_OUT, path="strict")
        self._warned = True
        warn_user(f"{text} {messages.WAY_OUT}")


def _named(where: Any, what: Any) -> str:
    return f"`{where}.{what}`".replace("`.", "`") if isinstance(where, str) else f"in {messages.argument_name(what)}"
