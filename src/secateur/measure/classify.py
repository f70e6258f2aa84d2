"""How good a classifier still is: accuracy and loss on labelled data, and agreement with the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import Batch, class_loss, is_pair, output_of
from secateur.load.mode import evaluating
from secateur.measure.quality import SUMS, prediction_sums
from secateur.progress import Track, quiet

_HINT = "accuracy and loss are measured with a class number for each sample"


def labelled(batches: Sequence[Batch]) -> bool:
    """Whether these are batches for a classifier: (inputs, targets), or mappings with one label for each sample."""
    return bool(batches) and all(
        is_pair(batch) or (isinstance(batch, Mapping) and getattr(batch.get("labels"), "ndim", 0) == 1)
        for batch in batches
    )


def sample_sums(
    model: nn.Module, batch: Batch, index: int, logits: torch.Tensor, dense: torch.Tensor | None = None
) -> torch.Tensor:
    """What the targets of each sample add up to: float64 [N, 7], in the order of `secateur.measure.quality.SUMS`.

    Args:
        model: a classifier, for messages.
        batch: (inputs, targets), or a mapping with ``labels``; targets of -100 count for nothing.
        index: the number of the batch, for messages.
        logits: what the model gives for it: [N, classes, ...] or [N, ..., classes].
        dense: what the dense model gives for it, if there is one.

    Raises:
        SecateurError: where targets are no class numbers, numbers of classes differ, or logits are not finite.
    """
    targets = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    for one, who in ((logits, type(model).__name__), (dense, "the dense model")):
        if one is not None and not bool(torch.isfinite(one).all()):
            raise SecateurError(f"{who} has NaN or infinite logits in batch {index}")
    if dense is not None and dense.shape != logits.shape:
        raise SecateurError(
            f"the model has logits of shape {list(logits.shape)} in batch {index}, but the dense model "
            f"{list(dense.shape)}: only models with the same classes can be compared"
        )
    class_loss(logits, targets.to(logits.device), _HINT, reduction="sum")  # says what does not fit
    last = targets.shape == logits.shape[:-1]
    flat = targets.flatten().to(logits.device)
    (places,) = torch.nonzero(flat != -100, as_tuple=True)

    def counted(x: torch.Tensor) -> torch.Tensor:
        rows = (x if last else x.movedim(1, -1)).flatten(0, -2)
        return rows.to(logits.device)[places]

    sums = prediction_sums(counted(logits), flat[places], None if dense is None else counted(dense)).cpu()
    found = torch.zeros(len(targets), len(SUMS), dtype=torch.float64)
    return found.index_add_(0, places.cpu() // max(1, targets[0].numel()), sums)


@dataclass(frozen=True)
class Classification:
    """What a classifier does on labelled data.

    Attributes:
        accuracy: Share of the targets that are the first choice, in [0, 1].
        loss: Mean cross entropy, in nats.
        samples: Targets that were counted.
        choices: The first choices, int64 [samples].
    """

    accuracy: float
    loss: float
    samples: int
    choices: torch.Tensor


def classify(model: nn.Module, batches: Sequence[Batch], track: Track = quiet) -> Classification:
    """Measure a classifier; targets of -100 count for nothing.

    Args:
        model: returns logits [N, classes, ...] or [N, ..., classes]; it is put into evaluation mode meanwhile.
        batches: (inputs, targets), or mappings with ``labels``.
        track: progress over the batches.

    Raises:
        SecateurError: without a batch, or where targets are no class numbers, or logits are not finite.
    """
    loss, choices, hits = 0.0, [], 0
    with evaluating(model), torch.inference_mode():
        for index, batch in enumerate(track(batches, "accuracy")):
            targets = batch["labels"] if isinstance(batch, Mapping) else batch[1]
            logits = output_of(model, batch)
            targets = targets.to(logits.device)
            loss += float(class_loss(logits, targets, _HINT, reduction="sum"))
            if not bool(torch.isfinite(logits).all()):
                raise SecateurError(f"{type(model).__name__} has NaN or infinite logits in batch {index}")
            last = targets.shape == logits.shape[:-1]
            counted = targets != -100
            first = logits.argmax(-1 if last else 1)[counted]
            hits += int((first == targets[counted]).sum())
            choices.append(first.cpu())
    if not choices or not sum(map(len, choices)):
        raise SecateurError("there is nothing to measure accuracy on: give at least one batch with targets")
    every = torch.cat(choices)
    return Classification(hits / len(every), loss / len(every), len(every), every)


def compare_classes(
    model: nn.Module, dense: nn.Module, batches: Sequence[Batch], track: Track = quiet
) -> dict[str, object]:
    """Accuracy and loss of the dense and the pruned model, and the share of first choices that agree.

    Args:
        model: the pruned model.
        dense: what it was made from.
        batches: as for `classify`.
        track: progress over the batches.

    Raises:
        SecateurError: as `classify`.
    """
    before, after = classify(dense, batches, track), classify(model, batches, track)
    return {
        "samples": before.samples,
        "accuracy": {"dense": before.accuracy, "pruned": after.accuracy},
        "loss": {"dense": before.loss, "pruned": after.loss},
        "top1": float((before.choices == after.choices).float().mean()),
    }
