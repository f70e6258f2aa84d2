"""How much worse than the dense model a changed one is: KL, loss and accuracy, all from one forward pass."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.predictions import IGNORED, Predictions, is_language, predictions
from secateur.measure.closeness import Closeness
from secateur.progress import Track, quiet
from secateur.score.fisher import are_logits, outputs_and_kind

MEASURES = ("kl", "loss", "accuracy", "mse")
_SUMS = ("kl", "loss", "hits", "count", "targets")
_CHUNK_ELEMENTS = 2**22  # logits that are looked at in float32 at a time: 16 MiB per temporary


class Harm:
    """What fixed batches tell of models that were made from a dense one.

    Attributes:
        batches: What is measured on.
        measures: What can be: kl (nats for each prediction) and, where the batches say what is right, loss (cross
            entropy, nats) and of classifiers accuracy (share, in [0, 1]); mse (squared error over the variance of the
            dense outputs) of models that give no probabilities.
        dense: The dense model's values; its kl and mse are 0.
        passes: Passes of the batches that it took to begin with.
        kept: Whether the dense model's outputs are in memory; if not, it is run again beside every measurement.
    """

    def __init__(
        self, dense: nn.Module, batches: Sequence[Batch], *, limit_bytes: int = 2**32, track: Track = quiet
    ) -> None:
        """Run the dense model once.

        Args:
            dense: The dense model; it must stay as it is.
            batches: Tensors, mappings or (inputs, targets).
            limit_bytes: Memory for its outputs.
            track: Progress over the batches.

        Raises:
            SecateurError: There are no batches, they do not fit the model, or its outputs are not finite.
        """
        if not batches:
            raise SecateurError("there are no batches to measure on: give at least one")
        self.batches, self._model = batches, dense
        self._closeness: Closeness | None = None
        self._rows: list[torch.Tensor] = []
        self.kept = True
        self.passes = 1 + 1 / len(batches)
        with evaluating(dense), torch.inference_mode():
            first, said = outputs_and_kind(run_on_data(dense, batches[0]))
            language = is_language(dense, batches[0], first)
            if not (language or are_logits(batches[0], said=said)):
                self._closeness = Closeness(dense, batches, track=track)
                self.measures: tuple[str, ...] = ("mse",)
                self.dense: Mapping[str, float] = {"mse": 0.0}
                return
            size, sums = 0, dict.fromkeys(_SUMS, 0.0)
            for batch in track(batches, "dense reference"):
                found = _predicted(dense, batch)
                if not bool(torch.isfinite(found.rows).all()):
                    raise SecateurError(
                        f"{type(dense).__name__} has NaN or infinite outputs: check the weights, the data and the dtype"
                    )
                rows = log_softmax(found.some(slice(None)).float(), -1)
                _add(sums, found, rows)
                size += rows.numel() * rows.element_size()
                self.kept = size <= limit_bytes
                self._rows = [*self._rows, rows] if self.kept else []
        told = _means(sums, type(dense).__name__)
        self.measures = tuple(name for name in told if name != "accuracy" or not language)
        self.dense = {name: told[name] for name in self.measures}

    def values(
        self, model: nn.Module, which: Sequence[int] | None = None, at: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """What a model's outputs come to, by each of the measures.

        Args:
            model: Made from the dense one.
            which: Numbers of the batches; all by default.
            at: Called with the number of each batch before it is run.

        Raises:
            SecateurError: Its outputs are NaN, or of other shapes.
        """
        numbers = list(range(len(self.batches)) if which is None else which)
        if self._closeness is not None:
            return {"mse": self._closeness(model, numbers, at)}
        sums = dict.fromkeys(_SUMS, 0.0)
        with evaluating(model), torch.inference_mode():
            for index in numbers:
                if at is not None:
                    at(index)
                own = _predicted(model, self.batches[index])
                dense = self._rows[index] if self.kept else self._again(index)
                if (own.count, own.rows.shape[-1]) != tuple(dense.shape):
                    raise SecateurError(
                        f"{type(model).__name__} gives {own.count} predictions of {own.rows.shape[-1]} classes in "
                        f"batch {index}, the dense model {dense.shape[0]} of {dense.shape[1]}"
                    )
                _add(sums, own, dense)
        found = _means(sums, type(model).__name__)
        return {name: found[name] for name in self.measures}

    def increase(self, values: Mapping[str, float]) -> dict[str, float]:
        """How much worse values are than the dense model's; of accuracy that is how far it fell."""
        return {
            name: self.dense[name] - value if name == "accuracy" else value - self.dense[name]
            for name, value in values.items()
        }

    def _again(self, index: int) -> torch.Tensor:
        with evaluating(self._model):
            return log_softmax(_predicted(self._model, self.batches[index]).some(slice(None)).float(), -1)


def run_on_data(model: nn.Module, batch: Batch) -> object:
    """What a model returns for a batch.

    Raises:
        SecateurError: The data does not fit the model.
    """
    try:
        return run(model, batch)
    except SecateurError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # the user's model on the user's data
        text = " ".join(str(error).split())
        raise SecateurError(f"{type(model).__name__} does not run on the data: {text[:300]}") from error


def _predicted(model: nn.Module, batch: Batch) -> Predictions:
    return predictions(model, batch, outputs_and_kind(run_on_data(model, batch))[0])


def _means(sums: Mapping[str, float], name: str) -> dict[str, float]:
    """The measures from sums; loss and accuracy where there are targets."""
    if not sums["count"]:
        raise SecateurError("the batches hold no prediction that counts: rows need at least 2 tokens")
    if not math.isfinite(sums["kl"]) or not math.isfinite(sums["loss"]):
        raise SecateurError(f"{name} has NaN or infinite outputs")
    found = {"kl": max(0.0, sums["kl"] / sums["count"])}
    if sums["targets"]:
        found |= {"loss": sums["loss"] / sums["targets"], "accuracy": sums["hits"] / sums["targets"]}
    return found


def _add(sums: dict[str, float], own: Predictions, dense: torch.Tensor) -> None:
    """Take in the predictions of one batch, in chunks; `dense` are log probabilities."""
    step = max(1, _CHUNK_ELEMENTS // max(1, dense.shape[-1]))
    for start in range(0, own.count, step):
        part = slice(start, start + step)
        own_PV = log_softmax(own.some(part).float(), -1)
        sums["kl"] += float(kl_div(own_PV, dense[part], reduction="sum", log_target=True))
        sums["count"] += len(own_PV)
        if own.targets is None:
            continue
        targets = own.targets[part].to(own_PV.device)
        real = targets != IGNORED
        targets, own_PV = targets[real], own_PV[real]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < own_PV.shape[-1]:
            raise SecateurError(
                f"the targets of the data are {int(targets.min())} to {int(targets.max())}, and the model knows "
                f"{own_PV.shape[-1]} classes"
            )
        sums["loss"] -= float(own_PV.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        sums["hits"] += int((own_PV.argmax(-1) == targets).sum())
        sums["targets"] += len(targets)
