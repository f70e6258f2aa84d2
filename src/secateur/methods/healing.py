"""Training after a cut: distillation from the dense model, and fine-tuning by any loss."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.load.batches import Batch, default_loss
from secateur.load.feed import Feed, Given
from secateur.load.model import fingerprint
from secateur.load.place import find_dtype
from secateur.methods.feeding import (
    TrainingData,
    between_evaluations,
    data_print,
    held_out_batches,
    order_of,
    steps_of,
    training_feed,
)
from secateur.methods.teachers import same_vocabulary, teachers, there
from secateur.methods.verbs import LOADING, Data
from secateur.progress import Track, quiet
from secateur.train import sharded
from secateur.train.adapters import adapted, merged
from secateur.train.features import matched
from secateur.train.loop import Work, fit
from secateur.train.objective import Distilling, Loss, Objective, Plain, Quality, own_metric
from secateur.train.optimize import proposed_rate
from secateur.train.settings import Distillation, Training, settings_from
from secateur.train.shares import check_shares, shared
from secateur.train.sparsity import Sparsity, sparsify
from secateur.train.state import seeded

MASKED_FROM = 0.05
"""Share of zeros from which a weight counts as masked: weights that were never pruned have a few by chance."""
_UNKNOWN_CUT = 0.3
_PATIENCE = "patience needs evaluations: give eval_data"
_LORA_RATE = 5.0  # adapters take about so much more than weights


@dataclass(frozen=True)
class Healed:
    """A model that was trained, and how that went."""

    model: nn.Module
    """A new one, in evaluation mode, of the dtypes of the one given. Of several processes, the first one has its
    weights, and it is on the meta device in the others."""
    report: Mapping[str, Any]
    """JSON values only; see `distill`."""


@world.told()
@seeded(0)  # so that the caller's random numbers go on as before
def distill(
    teacher: nn.Module | None,
    student: nn.Module,
    data: TrainingData,
    *,
    eval_data: Data = None,
    plan: Plan | None = None,
    cache: Path | str | None = None,
    teacher_dtype: str | torch.dtype | None = None,
    work: Path | str | None = None,
    track: Track = quiet,
    **options: Any,
) -> Healed:
    """Train a pruned model to say what the dense one says (Hinton et al. 2015; Minitron, arXiv:2407.14679).

    By default: forward KL of all logits at temperature 1, no cross entropy, AdamW at a rate proposed from the cut,
    linear decay to a tenth, one pass over the data. Zeros of a masked student stay zero. Of the run the weights of the
    best evaluation are kept: those closest to the teacher, or with `ce` the lowest perplexity (the highest accuracy).

    Of several processes (torchrun) all call it with the same arguments; both models are spread over them (FSDP2), and
    batches and steps stay those of one process.

    Args:
        teacher: the dense model; None where `cache` is whole. It stays as it is.
        student: the pruned model; it stays as it is. It is trained in float32, and gets its dtypes back.
        data: as for `prune`, a data loader, or sources with their weights ``{"reasoning.jsonl": 0.7, "web/": 0.3}``.
            Rows are drawn anew in every epoch.
        eval_data: held-out data, on which the run is evaluated.
        plan: that cut the student, so that `hidden` and `attention` know which blocks stayed.
        cache: folder for the teacher's logits of all rows that the run uses. They are made once; a run that finds them
            there does without the teacher.
        teacher_dtype: of a copy of the teacher that is asked; None = as it is.
        work: folder for the state of the run, ``metrics.jsonl`` and TensorBoard's files. A run that was killed and
            finds its state there goes on, and ends with the same bits. It is yours to remove.
        track: shows progress.
        options: of `train.settings.Training` and `Distillation`, and how data is read (see `batches_of`).

    Returns:
        The model, and a report: ``method``, ``settings``, ``steps``, ``tokens`` (None where not counted), ``lr``,
        ``before``, ``after`` and ``teacher`` (what was measured of the student and of the teacher), ``best`` (the step
        whose weights these are), ``stopped`` (why it ended), ``diverged``, ``resumed`` (the step it went on from, or
        None), ``masks`` (weights whose zeros were held), ``history``, ``logs``, ``seconds``.

    Raises:
        SecateurError: for bad input, models that do not fit together, and a state or cache of another run.
    """
    ask = _Asking(teacher, student, data, eval_data, cache, teacher_dtype, options, track)
    settings, losses, teacher, feed = ask.settings, ask.losses, ask.teacher, ask.feed
    pairs: Sequence[tuple[str, str]] = ()
    if losses.hidden or losses.attention:
        pairs = matched(there(teacher), student, losses.layers, plan)
    objective = Distilling(ask.source, losses, pairs)
    quality = None if ask.held_out is None else Quality(ask.held_out, ask.judge, by_teacher=not losses.ce, track=track)
    with (
        _showing_attention([m for m in (teacher,) if m is not None] if losses.attention else []),
        seeded(settings.seed),
    ):
        run = _Training(student, settings, ask.cut, None, 0.0, shows_attention=losses.attention > 0)
        with sharded.computing(run.trained):
            objective.begin(run.trained, *next(shared(feed).batches(0)))
        identity = {
            **_said(losses),
            **ask.source.identity,
            "held_out": _print(ask.held_out),
            "pairs": [list(p) for p in pairs],
        }
        healed = run.go("distill", objective, feed, ask.steps, quality, identity, work, track, "distilling")
    if quality is None or teacher is None:
        return healed
    told = {name: value for name, value in quality(teacher).items() if name not in ("kl", "distance")}
    return Healed(healed.model, {**healed.report, "teacher": told})


@world.told()
@seeded(0)
def cache_teacher(
    teacher: nn.Module,
    student: nn.Module,
    data: TrainingData,
    *,
    cache: Path | str,
    eval_data: Data = None,
    teacher_dtype: str | torch.dtype | None = None,
    track: Track = quiet,
    **options: Any,
) -> None:
    """Keep what a teacher says of all rows that `distill` with these arguments uses, so that it does without.

    Of each prediction the `top_k` largest logits are kept (64 by default), the rest counting as one: 6 bytes each.
    What was interrupted goes on where it was.

    Args:
        teacher: the dense model.
        student: the pruned model; only what data it takes is asked of it.
        data: as for `distill`.
        cache: folder to write.
        eval_data: as for `distill`.
        teacher_dtype: as for `distill`.
        track: shows progress.
        options: as for `distill`.

    Raises:
        SecateurError: as `distill`.
    """
    _Asking(teacher, student, data, eval_data, cache, teacher_dtype, options, track)


class _Asking:
    """What of distilling is settled before the student is touched: settings, data, and who is asked."""

    def __init__(
        self, teacher: nn.Module | None, student: nn.Module, data: Any, eval_data: Data, cache: Path | str | None,
        teacher_dtype: str | torch.dtype | None, options: Mapping[str, Any], track: Track,
    ) -> None:  # fmt: skip
        self.settings, self.losses, loading = settings_from(options, Training, Distillation, others=LOADING)
        folder = None if cache is None else Path(cache)
        if folder is not None and (self.losses.hidden or self.losses.attention):
            raise SecateurError("hidden and attention need the teacher in every step: leave cache out")
        if teacher is None and folder is None:
            raise SecateurError("give the teacher, or a cache of its logits")
        if self.settings.patience is not None and eval_data is None:
            raise SecateurError(_PATIENCE)
        sharded.check_plain(student, "student")
        if teacher is not None:
            sharded.check_plain(teacher, "teacher")
            same_vocabulary(teacher, student)
        kind = find_dtype(teacher_dtype)
        own = teacher is not None and kind is not None and not sharded.is_sharded(teacher)
        if teacher is not None and own:
            teacher = copy.deepcopy(teacher).to(kind)
        self.feed = training_feed(student, data, self.settings, loading)
        check_shares(self.feed)
        if teacher is not None and world.size() > 1 and not sharded.is_sharded(teacher):
            teacher = sharded.shard(teacher if own else sharded.twin(teacher))
        self.teacher = teacher
        self.steps = steps_of(self.settings, self.feed)
        self.held_out = held_out_batches(student, eval_data, loading, track)
        self.source, self.judge = teachers(
            teacher, folder, self.feed, self.held_out, self.steps, self.settings, self.losses, track
        )
        left = sum(p.numel() for p in student.parameters())
        self.cut = max(0.0, 1 - left / max(1, self.source.identity["params"]))


@world.told()
@seeded(0)
def finetune(
    model: nn.Module,
    data: TrainingData,
    *,
    loss: Loss | None = None,
    eval_data: Data = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    higher_is_better: bool = True,
    sparsity: Sparsity | None = None,
    lr_scores: float = 1e-2,
    work: Path | str | None = None,
    track: Track = quiet,
    **options: Any,
) -> Healed:
    """Train a pruned model by a loss, with all that `distill` has but a teacher.

    Zeros of a masked model stay zero.

    Args:
        model: it stays as it is; but where `sparsity` is given, its model is trained in place.
        data: as for `distill`.
        loss: called as ``loss(model, batch)``, returns one number (of several processes, a mean over the rows that
            each has); None = cross entropy of (inputs, class numbers), or
            the model's own loss of token rows and of mappings with ``labels``.
        eval_data: held-out data: perplexity, or accuracy and loss.
        evaluate: called as ``evaluate(model)``, in place of `eval_data`; returns one number. Of several processes all
            call it, with a model that is spread over them, and what the first returns counts.
        higher_is_better: of that number.
        sparsity: masks made by `sparsify` over this model, which move with the steps and are folded at the end.
        lr_scores: learning rate of their scores, where they learn any.
        work: as for `distill`.
        track: shows progress.
        options: of `train.settings.Training`, and how data is read.

    Returns:
        As `distill`.

    Raises:
        SecateurError: for bad input, and a state of another run.
    """
    settings, loading = settings_from(options, Training, others=LOADING)
    if evaluate is not None and eval_data is not None:
        raise SecateurError("evaluate and eval_data both say how good the model is: give one of them")
    if settings.patience is not None and evaluate is None and eval_data is None:
        raise SecateurError(_PATIENCE)
    sharded.check_plain(model, "model")
    if sparsity is not None and world.size() > 1:
        raise SecateurError(
            "masks that move need whole weights, which no process has when several train one model: train in one "
            "process, or prune first: zeros that are there are held"
        )
    if sparsity is not None and settings.lora is not None:
        raise SecateurError("lora trains no weights, and sparsity masks them: give one of them")
    if sparsity is not None and sparsity.scores() and settings.optimizer == "muon":
        raise SecateurError("optimizer muon is for weights alone, and this sparsity learns scores: take adamw")
    feed = training_feed(model, data, settings, loading)
    check_shares(feed)
    steps = steps_of(settings, feed)
    held_out = held_out_batches(model, eval_data, loading, track)
    quality: Any = None if held_out is None else Quality(held_out, track=track)
    if evaluate is not None:
        quality = _Own(evaluate, higher_is_better=higher_is_better)
    with seeded(settings.seed):
        run = _Training(model, settings, _UNKNOWN_CUT, sparsity, lr_scores, shows_attention=False)
    identity: dict[str, Any] = {
        "loss": "default" if loss is None else getattr(loss, "__qualname__", type(loss).__name__)
    }
    identity |= {"held_out": _print(held_out), "lr_scores": lr_scores}
    objective = Plain(loss or default_loss)
    return run.go("finetune", objective, feed, steps, quality, identity, work, track, "training")


class _Own:
    """A metric of the user's own, in the form of `Quality`."""

    def __init__(self, evaluate: Callable[[nn.Module], float], *, higher_is_better: bool) -> None:
        self.key, self.higher_is_better = getattr(evaluate, "__name__", "evaluate"), higher_is_better
        self._measure = own_metric(evaluate, self.key)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return self._measure(model)


class _Training:
    """A model made ready for training, and what undoes that.

    Attributes:
        model: a copy of the one given, which gets the trained weights.
        trained: what is trained: the same; of several processes, one that is spread over them.
    """

    def __init__(
        self, given: nn.Module, settings: Training, cut: float, sparsity: Sparsity | None, lr_scores: float, *,
        shows_attention: bool,
    ) -> None:  # fmt: skip
        self.settings, self._own, self._lr_scores = settings, sparsity is None, lr_scores
        self._print = fingerprint(given)
        alone = world.size() == 1
        model = given if not self._own else copy.deepcopy(given) if alone else sharded.twin(given)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._kinds = {name: t.dtype for name, t in tensors if t.dtype in (torch.float16, torch.bfloat16)}
        if self._kinds and not self._own:
            raise SecateurError(
                "this model is in half precision, which training loses small steps in: .float() it first"
            )
        _cast(model, dict.fromkeys(self._kinds, torch.float32) if alone else {})
        self._eager = _set_attention(model, "eager") if shows_attention else None
        masks = _masks(model) if self._own else {}
        if masks and settings.lora is not None:
            raise SecateurError(
                f"{len(masks)} weights of the model are masked, and adapters that are merged would fill their zeros: "
                "leave lora out"
            )
        self.masks = len(masks)
        self.sparsity = sparsify(model, method="fixed", masks=masks) if masks else sparsity
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._adapters = None if settings.lora is None else adapted(model, settings.lora)
        self.model = self.trained = model
        if not alone:
            self.trained = sharded.shard(
                sharded.twin(model), precision=settings.precision, dtype=torch.float32, trains=True
            )
        left = sum(p.numel() for p in model.parameters() if p.requires_grad)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        cut = max(cut, zeros / max(1, left))
        rate = proposed_rate(sum(p.numel() for p in given.parameters()), cut)
        self.rate = settings.lr or rate * (1.0 if self._adapters is None else _LORA_RATE)

    def go(
        self, method: str, objective: Objective, feed: Feed, steps: int, quality: Any, identity: Mapping[str, Any],
        folder: Path | str | None, track: Track, what: str,
    ) -> Healed:  # fmt: skip
        """Train, and give back the model as it is to be kept."""
        settings = self.settings
        shown = {**_said(settings), **identity}
        every = {"method": method, "model": self._print, "data": data_print(feed), "steps": steps}
        every["order"] = order_of(feed)
        every |= shown | {"lr": self.rate}
        work = Work(
            settings=settings, steps=steps, rate=self.rate, measure=quality,
            eval_every=settings.eval_every or between_evaluations(steps, settings, feed, getattr(quality, "rows", 0)),
            key=lambda: str(quality.key), higher_is_better=lambda: bool(quality.higher_is_better),
            sparsity=self.sparsity, rate_of_scores=self._lr_scores, folder=None if folder is None else Path(folder),
            identity=every, track=track, what=what,
        )  # fmt: skip
        for other in world.gathered(every):
            for key, value in every.items():
                if other[key] != value:
                    raise SecateurError(f"{key} is not the same in all processes: all must be given the same")
        done = fit(self.trained, objective, feed, work)
        after: Any = None
        if world.size() > 1:  # no process will have use of the whole model for this
            sharded.round_to(self.trained, self._kinds)
            with sharded.computing(self.trained):
                after = quality(self.trained) if quality is not None and self._kinds else None
            sharded.gather(self.trained, self.model)
        model = self._finished()
        per_step = None if feed.tokens is None else feed.tokens * settings.accumulate
        report: dict[str, Any] = {"method": method, "settings": dict(shown), "steps": done.steps}
        report |= {"tokens": None if per_step is None else per_step * done.steps, "lr": self.rate}
        if quality is not None:
            kept = next(entry["held_out"] for entry in done.history if entry["step"] == done.best)
            # Weights that go back to half precision are measured as they are then.
            if after is None:
                changed = world.size() == 1 and (self._kinds or self._adapters is not None)
                after = quality(model) if changed else kept
            report |= {"before": done.history[0]["held_out"], "after": after}
        report |= {"best": done.best, "stopped": done.stopped, "diverged": done.diverged, "resumed": done.resumed}
        report |= {"masks": self.masks, "history": list(done.history), "logs": list(done.logs), "seconds": done.seconds}
        return Healed(model, report)

    def _finished(self) -> nn.Module:
        model = self.model
        if self._adapters is not None:
            model = merged(self._adapters)
            for name, p in model.named_parameters():
                p.requires_grad_(self._flags[name])
        if self.sparsity is not None:
            model = self.sparsity.finalize()
        if self._eager is not None:
            _set_attention(model, self._eager)
        _cast(model, self._kinds)
        return model.eval()


# --- the model ---


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """What stays of the weights that are masked."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    found = {name: w != 0 for name, w in weights.items()}
    return {name: mask for name, mask in found.items() if 1 - float(mask.float().mean()) >= MASKED_FROM}


def _cast(model: nn.Module, kinds: Mapping[str, torch.dtype]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in kinds:
            tensor.data = tensor.data.to(kinds[name])


def _set_attention(model: nn.Module, kind: str) -> str:
    """Choose how a Hugging Face model computes attention; return how it did."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation"):
        raise SecateurError(f"attention: {type(model).__name__} is no Hugging Face model: leave that loss out")
    before = str(config._attn_implementation)
    chooses: Any = model
    chooses.set_attn_implementation(kind)
    return before


@contextmanager
def _showing_attention(models: Sequence[nn.Module]) -> Iterator[None]:
    """Let models compute attention in the way that can show it, for a while."""
    before: list[str] = []
    try:
        for model in models:
            before.append(_set_attention(model, "eager"))
        yield
    finally:
        for model, kind in zip(models, before, strict=False):
            _set_attention(model, kind)


def _print(held_out: Sequence[Batch] | None) -> str:
    return "" if held_out is None else data_print(Given(held_out, 0))


def _said(settings: Any) -> dict[str, Any]:
    """Settings as JSON values."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
