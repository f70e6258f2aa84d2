"""How good a classifier still is: accuracy and loss on labelled data, and agreement with the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import Batch, class_loss, is_pair, output_of
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet

_HINT = "accuracy and loss are measured with a class number for each sample"


def labelled(batches: Sequence[Batch]) -> bool:
    """Whether these are batches for a classifier: (inputs, targets), or mappings with one label for each sample."""
    return bool(batches) and all(
        is_pair(batch) or (isinstance(batch, Mapping) and getattr(batch.get("labels"), "ndim", 0) == 1)
        for batch in batches
    )


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
