"""What a batch asks of a model in training, and how good the model is between steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, default_loss, size_of
from secateur.load.mode import evaluating
from secateur.load.predictions import IGNORED, Predictions, is_language, predictions
from secateur.progress import Track, quiet
from secateur.train.features import Hidden, watching
from secateur.train.losses import Signal, attention_kl, forward_kl, in_chunks, relative_distance
from secateur.train.settings import Distillation
from secateur.train.shares import rounds, summed_up, total
from secateur.train.teacher import Said, Teacher, forward

EVALUATED_TOP_K = 64
Losses = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


class Objective(Protocol):
    """The loss of a batch; an nn.Module where it learns something of its own.

    Of several processes, each has a part of the batch and gives its part of the loss of the whole one.
    """

    def __call__(self, model: nn.Module, batch: Batch, numbers: tuple[int, ...] | None) -> Losses:
        """``loss``, and the parts that it is made of."""
        ...

    def state(self) -> nn.Module | None:
        """What is trained beside the model."""
        ...


class Plain:
    """A loss of the user's own, or the data's.

    Of several processes it is taken for a mean: over the targets where it is the data's, else over the rows.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Batch, numbers: tuple[int, ...] | None) -> Losses:
        """The loss."""
        del numbers
        found = self._loss(model, batch)
        if not isinstance(found, torch.Tensor) or found.numel() != 1 or not found.requires_grad:
            said = f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise SecateurError(f"the loss must be one number that depends on the model, not {said}")
        found = found.reshape(())
        if world.size() > 1:
            count = _targets(model, batch) if self._loss is default_loss else size_of(batch)
            found = found * (count / max(1, total(count, found.device)))
        return {"loss": found}

    def state(self) -> None:
        """Nothing."""


def _targets(model: nn.Module, batch: Batch) -> int:
    """What the default loss of a batch is a mean over."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("attention_mask"))
        missing = IGNORED if "labels" in batch else 0
    else:
        labels, missing = batch[1] if isinstance(batch, tuple | list) else None, IGNORED
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return size_of(batch)
    shifts = labels.dim() == 2 and any("CausalLM" in k.__name__ or "LMHead" in k.__name__ for k in type(model).__mro__)
    return int((labels[:, 1:] if shifts else labels).ne(missing).sum())


class Distilling:
    """The weighted sum of what a student differs in from its teacher.

    KL of the logits; of models whose outputs are none, their relative squared distance in its place.
    """

    def __init__(self, teacher: Teacher, settings: Distillation, pairs: Sequence[tuple[str, str]]) -> None:
        """Set it up.

        Args:
            teacher: asked for every batch.
            settings: weights.
            pairs: (student's, teacher's) modules that are held against each other.
        """
        self._teacher, self._settings = teacher, settings
        self._pairs = tuple(pairs) if settings.hidden or settings.attention else ()
        self._hidden = Hidden(self._pairs)

    def state(self) -> nn.Module:
        """The linear maps between features of different widths."""
        return self._hidden

    @torch.no_grad()
    def begin(self, model: nn.Module, batch: Batch, numbers: tuple[int, ...] | None) -> None:
        """Make the maps from the features of one batch, and see that both models fit together."""
        said = self._asked(batch, numbers)
        with evaluating(model), watching(model, [a for a, _ in self._watched]) as own:
            output, _, _ = forward(model, batch)
        if self._settings.hidden:
            self._hidden.begin(own, said.features, _real(model, batch, output))
        _fit(predictions(model, batch, output), said)

    def __call__(self, model: nn.Module, batch: Batch, numbers: tuple[int, ...] | None) -> Losses:
        """The losses of a batch; each part without its weight."""
        settings = self._settings
        said = self._asked(batch, numbers)
        with watching(model, [a for a, _ in self._watched]) as own:
            output, _, attentions = forward(model, batch, attention=settings.attention > 0)
        found = predictions(model, batch, output)
        losses = self._of_outputs(found, said)
        real = _real(model, batch, output)
        if settings.hidden:
            losses["hidden"] = self._hidden(own, said.features, real)
        if settings.attention:
            places = _numbers_of_blocks(self._pairs, len(attentions), len(said.attentions))
            every = [attention_kl(attentions[a], said.attentions[b], real) for a, b in places]
            losses["attention"] = torch.stack(every).mean()
        weights = {"kl": settings.kl * settings.temperature**2, "distance": settings.kl, "ce": settings.ce}
        weights |= {"hidden": settings.hidden, "attention": settings.attention}
        total = torch.stack([value * weights[name] for name, value in losses.items()]).sum()
        return {"loss": total, **losses}

    @property
    def _watched(self) -> Sequence[tuple[str, str]]:
        return self._pairs if self._settings.hidden else ()

    def _asked(self, batch: Batch, numbers: tuple[int, ...] | None) -> Said:
        paths = [b for _, b in self._watched]
        return self._teacher.says(batch, numbers, paths, attention=self._settings.attention > 0)

    def _of_outputs(self, found: Predictions, said: Said) -> Losses:
        settings = self._settings
        losses: Losses = {}
        if said.signal is None:
            if settings.ce:
                raise SecateurError("ce needs logits and targets, and the outputs of these models are no logits")
            if settings.kl and said.output is not None:
                losses["distance"] = relative_distance(
                    found.some(slice(None)), said.output.to(found.rows.device), over_all=True
                )
            return losses
        if settings.ce and found.targets is None:
            raise SecateurError("ce needs targets: give batches with labels, or (inputs, targets)")
        _fit(found, said)
        signal = said.signal.at(found.rows.device)
        if not settings.kl and not settings.ce:
            return losses
        kl, ce = summed(found, signal if settings.kl else None, settings.temperature, grad=True, ce=settings.ce > 0)
        if settings.kl:
            losses["kl"] = kl / max(1, total(found.count, kl.device))
        if settings.ce and found.targets is not None:
            targets = (found.targets != IGNORED).sum()
            world.add_up([targets])
            losses["ce"] = ce / targets.clamp(min=1)
        return losses


def _real(model: nn.Module, batch: Batch, output: torch.Tensor) -> torch.Tensor | None:
    """Which positions [B, S] are no padding; None = all, and where encoder and decoder have masks of their own."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    whole = not isinstance(mask, torch.Tensor) or mask.dim() != 2 or decodes
    return None if whole else mask.to(output.device).bool()  # type: ignore[union-attr]  # a tensor then


def summed(
    found: Predictions, signal: Signal | None, temperature: float, *, grad: bool, ce: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to the teacher and cross entropy, summed over predictions; zero where there is no signal or no wish."""
    zero = found.rows.new_zeros((), dtype=torch.float32)

    def part(which: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rows = found.some(which)
        kl = zero if signal is None else forward_kl(rows, signal.some(which), temperature).sum()
        if not ce or found.targets is None:
            return kl, zero
        return kl, functional.cross_entropy(rows.float(), found.targets[which], ignore_index=IGNORED, reduction="sum")

    total = in_chunks(found.count, found.rows.shape[-1], part, grad=grad)
    return total[0], total[1]


def _fit(found: Predictions, said: Said) -> None:
    """Raise SecateurError where student and teacher speak of different classes or predictions."""
    wanted = said.output if said.signal is None else said.signal.logs
    if wanted is None:
        return
    numbers, own = wanted.shape[-1] if said.signal is None else said.signal.classes, found.rows.shape[-1]
    if numbers != own:
        raise SecateurError(
            f"the teacher gives {numbers} numbers for each prediction and the student {own}: both need the same "
            "vocabulary, or classes"
        )
    if len(wanted) != found.count:
        raise SecateurError(
            f"the teacher makes {len(wanted)} predictions for a batch and the student {found.count}: both need as many"
        )


def _numbers_of_blocks(pairs: Sequence[tuple[str, str]], own: int, wanted: int) -> list[tuple[int, int]]:
    """Numbers of the attention layers that are held against each other, as their blocks are numbered."""
    try:
        found = [(int(a.rpartition(".")[2]), int(b.rpartition(".")[2])) for a, b in pairs]
    except ValueError as error:
        raise SecateurError(f"attention: layers must end in numbers, such as model.layers.3, not {pairs[0]}") from error
    if any(a >= own or b >= wanted for a, b in found):
        raise SecateurError(f"attention: the models give {own} and {wanted} layers of it, fewer than they have blocks")
    return found


class Quality:
    """How good a model is on held-out batches, again and again: against the data, and against a teacher's signals.

    The teacher is asked once; of many classes its `EVALUATED_TOP_K` largest are kept, the rest counting as one, so that
    ``kl`` is a little below the full one. Of several processes, each looks at its part of the batches.

    Attributes:
        key: what the best model is chosen by.
        higher_is_better: its direction.
        rows: in the batches.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        teacher: Teacher | None = None,
        *,
        by_teacher: bool = False,
        track: Track = quiet,
    ) -> None:
        """Ask the teacher.

        Args:
            batches: at least one.
            teacher: that takes its signals at temperature 1; None = only the data is measured against.
            by_teacher: whether the best model is the one closest to the teacher, and not the best on the data.
            track: shows progress.

        Raises:
            SecateurError: for no batches.
        """
        if not batches:
            raise SecateurError("there is nothing to evaluate on: eval_data has no batch")
        self._mine = [(index, batches[index], counts) for index, counts in rounds(len(batches))]
        self._count = len(batches)
        self.rows = sum(map(size_of, batches))
        self._said: list[Said] = []
        self.key, self.higher_is_better, self._by_teacher = "", False, by_teacher
        if teacher is None:
            return
        for index, batch, _ in track(self._mine, "what the teacher says of held-out data"):
            said = teacher.says(batch, (index,), (), attention=False)
            self._said.append(said if said.signal is None else Said(said.signal.small()))

    def __call__(self, model: nn.Module, track: Track = quiet) -> dict[str, float]:
        """Measure a model, in evaluation mode.

        Returns:
            Of a language model ``perplexity``; of a classifier with targets ``accuracy`` and ``loss``; with a teacher
            ``kl`` in nats for each prediction, or ``distance`` where outputs are no logits.
        """
        kl = ce = distance = 0.0
        predicted = targets = hits = 0
        language = True
        with evaluating(model), torch.no_grad():
            for place, (_, batch, counts) in enumerate(track(self._mine, "held-out quality")):
                output, logits, _ = forward(model, batch)
                language = language and is_language(model, batch, output)
                if not counts:
                    continue
                found = predictions(model, batch, output)
                said = self._said[place] if self._said else Said(None)
                predicted += found.count
                if said.output is not None:
                    distance += float(relative_distance(found.some(slice(None)), said.output.to(found.rows.device)))
                    continue
                signal = None if said.signal is None else said.signal.at(found.rows.device)
                sums = summed(found, signal, 1.0, grad=False, ce=logits)
                kl, ce = kl + float(sums[0]), ce + float(sums[1])
                if found.targets is not None and logits:
                    real = found.targets != IGNORED
                    targets += int(real.sum())
                    if not language:
                        first = found.some(slice(None)).argmax(-1)
                        hits += int((first == found.targets)[real].sum())
        every = summed_up([kl, ce, distance, predicted, targets, hits], output.device)
        return self._told(*every, language=language)

    def _told(
        self, kl: float, ce: float, distance: float, predicted: float, targets: float, hits: float, *, language: bool
    ) -> dict[str, float]:
        told: dict[str, float] = {}
        if targets and language:
            told["perplexity"] = math.exp(ce / targets) if ce / targets < 709 else math.inf
        elif targets:
            told |= {"accuracy": hits / targets, "loss": ce / targets}
        if self._said and self._said[0].signal is not None:
            told["kl"] = kl / max(1, predicted)
        elif self._said:
            told["distance"] = distance / self._count
        if not told:
            raise SecateurError("there is nothing to evaluate by: eval_data has no targets, and there is no teacher")
        self.key = next((name for name in ("kl", "distance") if self._by_teacher and name in told), next(iter(told)))
        self.higher_is_better = self.key == "accuracy"
        return told


def own_metric(evaluate: Callable[[nn.Module], float], name: str) -> Callable[[nn.Module], dict[str, float]]:
    """A metric of the user's own, told under its name."""

    def measure(model: nn.Module) -> dict[str, float]:
        with evaluating(model), torch.no_grad():
            return {name: float(evaluate(model))}

    return measure
