"""The training loop: plain torch, one model, any batches; evaluated, logged, saved, and entered again after a kill.

Not the Trainer of Hugging Face: that one wants its own kind of model, data set and output folder, and its resumed runs
are not the same run to the last bit. What is needed of it is below, and short.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from secateur import world
from secateur.errors import SecateurError
from secateur.load.feed import Feed, Item
from secateur.progress import Track, quiet
from secateur.train import shared_state
from secateur.train.callbacks import add_penalty
from secateur.train.features import block_names
from secateur.train.metrics import Metrics
from secateur.train.objective import Objective
from secateur.train.optimize import optimizers_of, rate_at
from secateur.train.settings import Training
from secateur.train.sharded import clipped, computing, drop_unused, finite
from secateur.train.shares import shared, summed_up
from secateur.train.sparsity import Sparsity
from secateur.train.state import Keeper, put_back, random_state, seeded, set_random_state, trained

_APART = 1_000_003
"""Between the seeds of processes: each has dropout of its own."""
Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Fitted:
    """What a run came to; the model itself holds the weights that were kept.

    Attributes:
        steps: that were done.
        best: the step after which the kept weights were.
        stopped: why it ended.
        diverged: whether it had to.
        resumed: the step that it went on from; None where it ran through.
        history: an entry for each evaluation: ``step``; ``train``, the means since the entry before of the loss and its
            parts, with the last ``lr`` and ``grad_norm``; ``held_out``, what was measured. The first is of the model as
            it came.
        logs: what metrics were written to.
        seconds: in this process.
    """

    steps: int
    best: int
    stopped: str
    diverged: bool
    resumed: int | None
    history: Sequence[Mapping[str, Any]]
    logs: Sequence[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run works with beside the model, the objective and the data.

    Attributes:
        settings: of the run.
        steps: optimiser steps.
        rate: highest learning rate.
        measure: model -> named numbers; None = nothing is measured.
        eval_every: steps between measurements; None = ten in the run.
        key: the one that the best model is chosen by.
        higher_is_better: its direction.
        sparsity: masks that move with the steps.
        rate_of_scores: learning rate of learned masks.
        folder: where the state is kept; None = nowhere.
        identity: what makes it this run, see `Keeper`.
        track: shows progress.
        what: is being done, for that.
    """

    settings: Training
    steps: int
    rate: float
    measure: Measure | None = None
    eval_every: int | None = None
    key: Callable[[], str] = str
    higher_is_better: Callable[[], bool] = bool
    sparsity: Sparsity | None = None
    rate_of_scores: float = 1e-2
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    track: Track = quiet
    what: str = "training"


def fit(model: nn.Module, objective: Objective, feed: Feed, work: Work) -> Fitted:
    """Train a model in place.

    Args:
        model: in training mode meanwhile, and in evaluation mode afterwards. Of several processes, one that
            `sharded.shard` has spread over them; all of them call this.
        objective: batch -> losses.
        feed: batches; of several processes, each takes its rows of them.
        work: all else.

    Returns:
        What happened. A loss or gradient that is not finite ends the run before it does harm; the model is then the
        best one, or the last that was saved.

    Raises:
        SecateurError: for a state of another run in the folder, and one that cannot be saved.
    """
    begin = time.perf_counter()
    with seeded(work.settings.seed + _APART * world.rank()), ExitStack() as stack:
        if work.settings.recompute:
            stack.enter_context(recomputing(model))
        run = _Run(model, objective, work)
        stack.callback(run.metrics.close)
        model.zero_grad(set_to_none=True)
        model.train()
        stopped = run.go(shared(feed))
        run.finish()
    model.eval()
    return Fitted(
        run.step,
        run.best_step,
        stopped,
        run.diverged,
        run.resumed,
        run.history,
        run.metrics.where,
        time.perf_counter() - begin,
    )


class _Run:
    """The moving parts of a run."""

    def __init__(self, model: nn.Module, objective: Objective, work: Work) -> None:
        self.model, self.objective, self.work = model, objective, work
        self.extra = objective.state()
        scores = [] if work.sparsity is None else work.sparsity.scores()
        self.optimizers = optimizers_of(
            model, self.extra, scores, work.settings, work.rate, work.rate_of_scores
        )  # fmt: skip
        self.keeper = Keeper(work.folder, work.identity)
        self.step = self.best_step = self.worse = 0
        self.best: float | None = None
        self.diverged = False
        self.resumed: int | None = None
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        state = self.keeper.found()
        if state is not None:
            self._restore(state)
        folder, project = (work.folder, work.settings.wandb) if world.first() else (None, None)
        self.metrics = Metrics(folder, project, self.step)
        self._random = None if state is None else shared_state.random_of(state)

    # --- steps ---

    def go(self, feed: Feed) -> str:
        """Do the steps that are left; say why it ended."""
        settings, steps = self.work.settings, self.work.steps
        if self._over():
            return self._patience_is_out()
        if not self.history:
            trouble = self._looked({})
            if trouble:
                raise SecateurError(f"the model as it came: {trouble}")
        batches = feed.batches(self.step * settings.accumulate)
        if self._random is not None:
            set_random_state(self._random)
        elif self.resumed:
            torch.manual_seed(settings.seed + self.step + _APART * (1 + world.rank()))
        every = self.work.eval_every or max(1, steps // 10)
        save = settings.save_every or max(1, steps // 10)
        for _ in self.work.track(range(self.step, steps), self.work.what):
            norm, trouble = self._stepped(batches)
            if trouble:
                return self._diverge(trouble, self.step + 1)
            self._epochs(feed)
            if self.step % every == 0 or self.step == steps:
                trouble = self._looked({"lr": self._rate(self.step - 1), "grad_norm": norm})
                if trouble:
                    return self._diverge(trouble, self.step)
            if self.step % save == 0 or self.step % every == 0 or self.step == steps:
                self._save()
            if self._over():
                return self._patience_is_out()
        return f"all {steps} steps are done"

    def _stepped(self, batches: Iterator[Item]) -> tuple[float, str]:
        """One optimiser step: the norm of its gradient, and what is wrong with it."""
        settings = self.work.settings
        parts: dict[str, float] = {}
        for _ in range(settings.accumulate):
            batch, numbers = next(batches)
            device = next(self.model.parameters()).device.type
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = self.objective(self.model, batch, numbers)
            (losses["loss"] / settings.accumulate).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                parts[name] = parts.get(name, 0.0) + float(value.detach()) / settings.accumulate
        every = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        if world.size() > 1:
            parts = dict(zip(parts, summed_up(list(parts.values()), every[0].device), strict=True))
            if self.extra is not None:  # not spread, so nobody has added its gradients up
                world.add_up(p.grad for p in self.extra.parameters() if p.grad is not None)
            drop_unused(self.model)
        if not math.isfinite(parts["loss"]):
            return 0.0, f"the loss is {parts['loss']}"
        norm = clipped(every, settings.clip or math.inf)
        if not math.isfinite(norm):
            return norm, f"the gradient is {norm}"
        rate = rate_at(self.step, self.work.steps, settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            if self.work.sparsity is not None:
                add_penalty(self.work.sparsity, optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.work.sparsity is not None:
            self.work.sparsity.step()
        for name, number in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + number
        self.sums["steps"] = self.sums.get("steps", 0.0) + 1
        self.metrics.add(self.step, {**parts, "lr": self._rate(self.step - 1), "grad_norm": norm})
        return norm, ""

    def _rate(self, step: int) -> float:
        return self.work.rate * rate_at(step, self.work.steps, self.work.settings)

    def _epochs(self, feed: Feed) -> None:
        """Tell the masks of epochs that are over."""
        if self.work.sparsity is not None and feed.per_epoch:
            while self.work.sparsity.epochs < self.step * self.work.settings.accumulate // feed.per_epoch:
                self.work.sparsity.epoch()

    # --- looking ---

    def _looked(self, entry: Mapping[str, Any]) -> str:
        """Measure, and note how it went; say what is wrong."""
        steps = self.sums.pop("steps", 0.0)
        told: dict[str, Any] = {"step": self.step}
        if self.sums:
            told["train"] = {name: total / steps for name, total in self.sums.items()} | dict(entry)
        self.sums = {}
        if not finite(self.model):
            return "there are weights that are not finite"
        measure = self.work.measure
        if measure is None:
            self.history.append(told)
            self.best_step = self.step
        else:
            with computing(self.model):
                here = dict(measure(self.model))
            found = world.from_first(lambda: here)  # what comes of it must be the same in all processes
            value = found[self.work.key()]
            if not math.isfinite(value):
                return f"{self.work.key()} on held-out data is {value}"
            self.history.append(told | {"held_out": found})
            self.metrics.add(self.step, {f"held-out/{name}": number for name, number in found.items()})
            sign = 1 if self.work.higher_is_better() else -1
            # While sparsity still grows, the best model is the one with the most of it.
            settled = self._settled()
            better = not settled or self.best is None or sign * value > sign * self.best
            self.worse = 0 if better else self.worse + 1
            if better or self.work.settings.keep == "last":
                self.best_step = self.step
                if self.work.settings.keep == "best":
                    self._keep()
            self.best = (value if settled else None) if better else self.best
        if self.work.settings.keep == "last" or measure is None:
            self._keep()
        self.keeper.tell(self.history)
        return ""

    def _settled(self) -> bool:
        """Whether the masks have the sparsity that they end with."""
        sparsity = self.work.sparsity
        schedule = None if sparsity is None else sparsity.settings.schedule
        if sparsity is None or schedule is None:
            return True
        return (sparsity.steps if schedule.per == "batch" else sparsity.epochs) >= schedule.last

    def _over(self) -> bool:
        patience = self.work.settings.patience
        return patience is not None and self.worse >= patience

    def _patience_is_out(self) -> str:
        return f"step {self.step}: {self.worse} evaluations without a better one"

    def _diverge(self, trouble: str, step: int) -> str:
        self.diverged = True
        return f"step {step} of {self.work.steps}: {trouble}, the training has diverged: take a smaller lr"

    # --- state ---

    def _keep(self) -> None:
        """Keep the weights as the best."""
        if world.size() > 1 and self.work.folder is not None:
            shared_state.save_best(self.work.folder, self.step, self.model, self.extra)
        else:
            self.keeper.save_best(trained(self.model, self.extra))

    def _save(self) -> None:
        if self.work.folder is None:
            return
        sparsity = self.work.sparsity
        state: dict[str, Any] = {
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "worse": self.worse,
            "history": self.history,
            "sums": self.sums,
            "sparsity": None if sparsity is None else sparsity.state_dict(),
        }
        if world.size() > 1:
            state = self.keeper.named(state | {"random": world.gathered(random_state())})
            shared_state.save_state(self.work.folder, state, self.model, self.extra, self.optimizers)
            return
        state |= {"tensors": trained(self.model, self.extra), "random": random_state()}
        self.keeper.save(state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]})

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step = self.resumed = state["step"]
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
        self.history, self.sums = list(state["history"]), dict(state["sums"])
        if world.size() > 1 or "shards" in state:
            shared_state.restore(state, self.model, self.extra, self.optimizers)
        else:
            put_back(state["tensors"], self.model, self.extra)
            for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(own)
        if self.work.sparsity is not None:
            self.work.sparsity.load_state_dict(state["sparsity"])

    def finish(self) -> None:
        """Leave the model with the weights that are kept."""
        folder = self.work.folder
        if not self.diverged and self.best_step == self.step:
            pass
        elif folder is not None and (world.size() > 1 or shared_state.best_of(folder, self.best_step)):
            shared_state.load_best(folder, self.best_step, self.model, self.extra)
        else:
            put_back(self.keeper.load_best(), self.model, self.extra)
        self.model.zero_grad(set_to_none=True)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let the blocks of a model keep no activations for the backward pass but compute them again there."""
    blocks = [model.get_submodule(name) for name in block_names(model)]

    def again(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            contexts = lambda: (nullcontext(), _statistics_kept(block))  # noqa: E731
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run

    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = again(block)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch norms take their statistics from the first pass alone."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
