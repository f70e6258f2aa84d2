"""How close a model of any kind still is to the dense one, by what both give for the same batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.predictions import class_dim, counted, is_language
from secateur.progress import Track, quiet
from secateur.score.fisher import are_logits, outputs_and_kind

Runs = Callable[[nn.Module, Sequence[Batch]], Iterable[Any]]


def _one_by_one(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Any]:
    for batch in batches:
        with evaluating(model), torch.inference_mode():
            result = run(model, batch)
        yield result


class Closeness:
    """Distance of models to a dense one on fixed batches.

    Attributes:
        batches: What is measured on.
        measure: kl, in nats for each prediction: of language models over the tokens that are predicted, of classifiers
            over their outputs; or mse, the squared error over the variance of what the dense model gives.
    """

    def __init__(
        self, dense: nn.Module, batches: Sequence[Batch], *, track: Track = quiet, runs: Runs | None = None
    ) -> None:
        """Run the dense model once.

        Args:
            dense: The dense model.
            batches: Tensors, mappings or (inputs, targets). Where an ``attention_mask`` [B, S] is 0, an output
                [B, S, ...] does not count.
            track: Progress over the batches.
            runs: (model, batches) -> what it returns for each; a forward pass for each by default.

        Raises:
            SecateurError: There are no batches, or the outputs are not finite or no tensors.
        """
        if not batches:
            raise SecateurError("there are no batches to compare outputs on: give at least one")
        self.batches, self._runs = batches, runs or _one_by_one
        with evaluating(dense), torch.no_grad():
            first, said = outputs_and_kind(run(dense, batches[0]))
        self._language = is_language(dense, batches[0], first)
        self.measure = "kl" if self._language or are_logits(batches[0], said=said) else "mse"
        with world.as_one():
            numbers = self.own(range(len(batches)))
            results = iter(self._runs(dense, [batches[i] for i in numbers]))
            found = ((i, next(results)) for i in track(numbers, "dense reference"))
            self._dense = {i: self._outputs(dense, result, i) for i, result in found}

    @staticmethod
    def own(which: Sequence[int]) -> list[int]:
        """Of these batches the ones that this process runs; all, where data is not split among processes."""
        return [i for i in which if not world.split() or i % world.size() == world.rank()]

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
        with world.as_one():
            distance, total = self._sums(model, which, at)
        if world.split():
            both = torch.tensor([distance, total], dtype=torch.float64)
            world.add_up([both])
            distance, total = both.tolist()
        return max(0.0, distance / max(total, 1e-30))

    def _sums(
        self, model: nn.Module, which: Sequence[int] | None, at: Callable[[int], None] | None
    ) -> tuple[float, float]:
        """Distance, and what it is divided by."""
        distance = total = 0.0
        numbers = self.own(range(len(self.batches)) if which is None else which)
        results = iter(self._runs(model, [self.batches[i] for i in numbers]))
        for index in numbers:
            if at is not None:
                at(index)
            dense = self._dense[index]
            own = self._outputs(model, next(results), index)
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
        return distance, total

    def _outputs(self, model: nn.Module, result: Any, index: int) -> torch.Tensor:
        """What counts of the outputs: log probabilities [predictions, classes], or numbers."""
        batch = self.batches[index]
        with torch.inference_mode():
            found, _ = outputs_and_kind(result)
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
