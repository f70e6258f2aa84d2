"""How close a model of any kind still is to the dense one, by what both give for the same batches."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.predictions import class_dim, counted, is_language
from secateur.progress import Track, quiet
from secateur.score.fisher import are_logits, outputs_and_kind


class Closeness:
    """Distance of models to a dense one on fixed batches.

    Attributes:
        batches: What is measured on.
        measure: kl, in nats for each prediction: of language models over the tokens that are predicted, of classifiers
            over their outputs; or mse, the squared error over the variance of what the dense model gives.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Batch], *, track: Track = quiet) -> None:
        """Run the dense model once.

        Args:
            dense: The dense model.
            batches: Tensors, mappings or (inputs, targets). Where an ``attention_mask`` [B, S] is 0, an output
                [B, S, ...] does not count.
            track: Progress over the batches.

        Raises:
            SecateurError: There are no batches, or the outputs are not finite or no tensors.
        """
        if not batches:
            raise SecateurError("there are no batches to compare outputs on: give at least one")
        self.batches = batches
        with evaluating(dense), torch.no_grad():
            first, said = outputs_and_kind(run(dense, batches[0]))
        self._language = is_language(dense, batches[0], first)
        self.measure = "kl" if self._language or are_logits(batches[0], said=said) else "mse"
        self._dense = [self._outputs(dense, batch, i) for i, batch in enumerate(track(batches, "dense reference"))]

    def __call__(
        self, model: nn.Module, which: Sequence[int] | None = None, at: Callable[[int], None] | None = None
    ) -> float:
        """The distance of a model; 0 for the dense one.

        Args:
            model: To compare.
            which: Numbers of the batches; all by default.
            at: Called with the number of each batch before it is run.

        Raises:
            SecateurError: Its outputs are not finite, or of other shapes.
        """
        distance = total = 0.0
        for index in range(len(self.batches)) if which is None else which:
            if at is not None:
                at(index)
            dense = self._dense[index]
            own = self._outputs(model, self.batches[index], index)
            if own.shape != dense.shape:
                raise SecateurError(
                    f"{type(model).__name__} gives {list(own.shape)} in batch {index}, the dense model "
                    f"{list(dense.shape)}: only equal outputs can be compared"
                )
            if self.measure == "kl":
                distance += float(functional.kl_div(own, dense, reduction="sum", log_target=True))
                total += len(dense)
            else:
                distance += float((own - dense).square().sum(dtype=torch.float64))
                total += float((dense - dense.mean()).square().sum(dtype=torch.float64))
        return max(0.0, distance / max(total, 1e-30))

    def _outputs(self, model: nn.Module, batch: Batch, index: int) -> torch.Tensor:
        """What counts of the outputs: log probabilities [predictions, classes], or numbers."""
        with evaluating(model), torch.inference_mode():
            found, _ = outputs_and_kind(run(model, batch))
            counts = counted(batch, found, language=self._language)
            if self.measure == "kl":
                found = found.movedim(class_dim(batch, found), -1)
            found = (found.flatten(0, -2) if counts is None else found[counts]) if found.dim() > 1 else found
            found = found.float()
            if not bool(torch.isfinite(found).all()):
                raise SecateurError(
                    f"{type(model).__name__} has NaN or infinite outputs in batch {index}: check the weights and dtype"
                )
            return functional.log_softmax(found, -1) if self.measure == "kl" else found
