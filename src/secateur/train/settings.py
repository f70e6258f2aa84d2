"""All choices of a training run: how long, how fast, in which precision, what is learned from, what is kept."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.choose.budget import parse_count
from secateur.errors import SecateurError, nearest


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained.

    Attributes:
        tokens: length of the run in tokens, "1M" or a number; for language models. Of tokens, steps and epochs one may
            be given; none = one epoch.
        steps: length in optimiser steps.
        epochs: length in passes over the data.
        accumulate: batches whose gradients make one step.
        lr: learning rate at its highest; None = proposed from the size of the model and of the cut.
        lr_end: learning rate at the end, as a share of `lr`.
        warmup: steps over which it rises from zero; None = 100, or a tenth of a shorter run.
        decay: linear or cosine from `lr` to its end, or constant.
        optimizer: adamw, muon (matrices within the model by Muon, all else by AdamW) or sgd (Nesterov, momentum .9).
        weight_decay: decoupled (of sgd, as a gradient), of matrices; not of biases, norms and embeddings.
        clip: largest norm of the gradient; 0 = not clipped.
        precision: of the forward pass: float32, or bfloat16 by autocast. Weights are trained in float32.
        recompute: keep no activations within blocks, compute them again in the backward pass.
        eval_every: steps between evaluations; None = ten in the run, or fewer: at least as many rows are trained on
            between two as one looks at.
        patience: end after so many evaluations without a better one; None = never.
        keep: the weights of the best evaluation, or the last ones.
        save_every: steps between saved states, from which a killed run goes on; None = ten in the run.
        lora: train adapters of this rank beside all linear layers in place of the weights, and merge them at the end.
        wandb: project of Weights & Biases that metrics go to as well.
        seed: of the order of the data and of dropout.
    """

    tokens: int | str | None = None
    steps: int | None = None
    epochs: float | None = None
    accumulate: int = 1
    lr: float | None = None
    lr_end: float = 0.1
    warmup: int | None = None
    decay: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    eval_every: int | None = None
    patience: int | None = None
    keep: Literal["best", "last"] = "best"
    save_every: int | None = None
    lora: int | None = None
    wandb: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise SecateurError for the first value that makes no sense."""
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SecateurError(f"{' and '.join(given)} both say how long the run is: give one of them")
        if self.tokens is not None:
            parse_count("tokens", self.tokens)
        counts = ("steps", "accumulate", "eval_every", "patience", "save_every", "lora")
        _numbers(self, (*counts, "warmup", "seed"), ("epochs", "lr", "lr_end", "weight_decay", "clip"))
        _at_least(self, dict.fromkeys(counts, 1) | {"warmup": 0, "weight_decay": 0, "clip": 0, "seed": 0})
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise SecateurError(f"{name} must be above 0, not {value:g}")
        if not 0 <= self.lr_end <= 1:
            raise SecateurError(f"lr_end is a share of lr, between 0 and 1, not {self.lr_end:g}")
        _one_of(self)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a student learns from its teacher.

    Attributes:
        kl: weight of KL(teacher || student) of the logits.
        temperature: of both in it; the loss is multiplied by its square, so that gradients keep their size.
        top_k: logits of the teacher that are kept for each prediction, the rest counting as one; None = all, or 64
            where they are cached on disk.
        ce: weight of the cross entropy with the data's own targets.
        hidden: weight of the distance between what blocks of both give, relative to its spread in the teacher.
        attention: weight of the KL between the attention of both, averaged over heads; Hugging Face models.
        layers: which block of the teacher each block of the student is compared with: name -> name; None = the same
            blocks where the student was cut, else evenly spread ones.
    """

    kl: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    ce: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    layers: Mapping[str, str] | None = None

    def check(self) -> None:
        """Raise SecateurError for the first value that makes no sense."""
        weights = ("kl", "ce", "hidden", "attention")
        _numbers(self, ("top_k",), (*weights, "temperature"))
        _at_least(self, dict.fromkeys(weights, 0) | {"top_k": 1})
        if not any(getattr(self, name) for name in weights):
            raise SecateurError(f"there is nothing to learn from: {', '.join(weights)} are all 0")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise SecateurError(f"temperature must be above 0, not {self.temperature:g}")
        if self.layers is not None and not (self.hidden or self.attention):
            raise SecateurError("layers says what hidden and attention compare, and both are 0")


def settings_from(options: Mapping[str, Any], *kinds: type, others: Iterable[str] = ()) -> list[Any]:
    """Settings of each kind from options of all of them, checked; and last, as a mapping, those among `others`.

    Raises:
        SecateurError: for an option that none has, or a value that makes no sense.
    """
    rest = set(others)
    fields = [[entry.name for entry in dataclasses.fields(kind)] for kind in kinds]
    known = {*rest, *(name for own in fields for name in own)}
    for name in options:
        if name not in known:
            raise SecateurError(f"training has no option {name!r}{nearest(name, known)}")
    made = [kind(**{n: options[n] for n in own if n in options}) for kind, own in zip(kinds, fields, strict=True)]
    for settings in made:
        settings.check()
    return [*made, {name: value for name, value in options.items() if name in rest}]


def _numbers(settings: Any, whole: Iterable[str], others: Iterable[str]) -> None:
    """Raise SecateurError for what is given as something else than a number."""
    for names, kinds, what in ((whole, int, "a whole number"), (others, int | float, "a number")):
        for name in names:
            value = getattr(settings, name)
            left_out = value is None and getattr(type(settings), name) is None
            if not left_out and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise SecateurError(f"{name} must be {what}, not {value!r}")


def _at_least(settings: Any, least: Mapping[str, float]) -> None:
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not (value >= bound and math.isfinite(value)):
            raise SecateurError(f"{name} must be at least {bound:g}, not {value:g}")


def _one_of(settings: Any) -> None:
    for name, known in _CHOICES.items():
        value = getattr(settings, name)
        if value not in known:
            raise SecateurError(f"{name}: there is no {value!r}{nearest(str(value), known)}")


_CHOICES = {
    "decay": ("linear", "cosine", "constant"),
    "optimizer": ("adamw", "muon", "sgd"),
    "precision": ("float32", "bfloat16"),
    "keep": ("best", "last"),
}
