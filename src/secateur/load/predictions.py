"""What of a model's outputs are predictions, and what they should have been."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import Batch, is_pair

IGNORED = -100
"""The target of what counts for nothing, in transformers as in torch."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of one batch.

    Attributes:
        rows: outputs [N, V]; a view where it can be.
        places: which rows count, int64 [P]; None = all.
        targets: class numbers int64 [P], `IGNORED` where there is none; None where the batch has no targets.
    """

    rows: torch.Tensor
    places: torch.Tensor | None
    targets: torch.Tensor | None

    @property
    def count(self) -> int:
        """P."""
        return len(self.rows) if self.places is None else len(self.places)

    def some(self, part: slice) -> torch.Tensor:
        """The rows of some predictions, [., V]."""
        return self.rows[part] if self.places is None else self.rows[self.places[part]]


def predictions(model: nn.Module, batch: Batch, output: torch.Tensor) -> Predictions:
    """Find the predictions in the outputs of a batch.

    Of a language model, position t predicts token t + 1, where neither is padding nor a label of `IGNORED`; of one
    behind an encoder, label t; with labels [B, S] of a masked language model, label t. Of a pair, classes are the
    second dimension where that is what fits the targets, else the last.

    Args:
        model: that gave them.
        batch: that they are of.
        output: logits, or other numbers: floating point, [..., V].

    Raises:
        SecateurError: The targets do not fit the outputs.
    """
    if output.dim() < 2:
        output = output.reshape(-1, 1)  # one number for each sample
    if is_pair(batch):
        targets = batch[1]  # type: ignore[index]  # a pair
        if targets.is_floating_point():
            rows, targets = output.movedim(1 if output.dim() > 3 else -1, -1), None
        else:
            rows = output.movedim(class_dim(batch, output), -1)
            targets = targets.to(output.device).reshape(-1)
        return _found(rows.reshape(-1, rows.shape[-1]), None, targets)
    rows = output.reshape(-1, output.shape[-1])
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    labels = labels.to(output.device) if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    shifted = is_language(model, batch, output) and not decodes and not _fills_masks(model)
    if decodes:
        counts = _decoded(batch, output) if labels is None else labels != IGNORED
    else:
        counts = counted(batch, output, language=shifted)
    if shifted:
        named: Any = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        tokens = (named["input_ids"] if labels is None else labels).to(output.device)
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)
        if counts is not None and labels.shape == counts.shape:
            counts = counts & (labels != IGNORED)
    return _found(rows, counts, None if labels is None else labels.reshape(-1))


def _found(rows: torch.Tensor, counts: torch.Tensor | None, targets: torch.Tensor | None) -> Predictions:
    if targets is not None and len(targets) != len(rows):
        raise SecateurError(f"there are {len(targets)} targets for {len(rows)} predictions: they must be as many")
    if counts is None:
        return Predictions(rows, None, targets)
    (places,) = torch.nonzero(counts.reshape(-1), as_tuple=True)
    return Predictions(rows, places, None if targets is None else targets[places])


def _decoded(batch: Batch, output: torch.Tensor) -> torch.Tensor | None:
    """Which positions [B, T] of a decoder count; ``attention_mask`` is the encoder's."""
    mask = batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None
    return mask.to(output.device).bool() if isinstance(mask, torch.Tensor) else None


def counted(batch: Batch, output: torch.Tensor, *, language: bool) -> torch.Tensor | None:
    """Which positions [B, S] count: what the mask keeps; of a language model, what has a next token. None = all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    real = None
    if isinstance(mask, torch.Tensor) and output.dim() > 2 and mask.shape == output.shape[:2]:
        real = mask.to(output.device).bool()
    if not language:
        return real
    real = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device) if real is None else real
    next_one = torch.zeros_like(real)
    next_one[:, :-1] = real[:, 1:] & real[:, :-1]
    return next_one


def is_language(model: nn.Module, batch: Batch, output: torch.Tensor) -> bool:
    """Whether the model predicts tokens."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = isinstance(batch, torch.Tensor) or (isinstance(batch, Mapping) and "input_ids" in batch)
    return tokens and output.dim() == 3 and output.shape[-1] == getattr(text, "vocab_size", None)


def class_dim(batch: Batch, output: torch.Tensor) -> int:
    """Of a pair whose targets are fewer by the second dimension, that; else the last."""
    spread = isinstance(batch, tuple | list) and output.dim() > 2 and batch[1].shape != output.shape[:-1]
    return 1 if spread else output.dim() - 1


def _fills_masks(model: nn.Module) -> bool:
    """Whether it predicts the token at the same place; transformers names such classes so, and cuts inherit them."""
    return any("MaskedLM" in kind.__name__ for kind in type(model).__mro__)
