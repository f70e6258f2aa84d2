"""How good a language model still is: perplexity, distance from the dense model, and metrics of the user's own."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import log_softmax

from secateur import world
from secateur.errors import SecateurError
from secateur.load.data import Tokenizer
from secateur.load.functions import find_function
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.progress import Track, quiet

if TYPE_CHECKING:
    from secateur.measure.choice import Question

Batch = torch.Tensor | Mapping[str, torch.Tensor]
"""Token ids, int64 [B, S], or a model's keyword arguments."""

_IGNORED = -100  # the label of positions that count for nothing, in transformers as in torch
_CHUNK_ELEMENTS = 2**22  # logits that are looked at in float32 at a time: 16 MiB per temporary


def logits_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run `model` on `batch` and return its logits, in its own dtype and on its own device.

    Hugging Face models (those with a ``config``) run without a key/value cache. Of a mapping, ``labels`` are handed
    to encoder-decoder models only, which make their decoder's input from them: others would only compute a loss.

    Args:
        model: Takes token ids and returns a tensor, or an output with ``.logits``.
        batch: Token ids int64 [B, S], or keyword arguments of the model.

    Returns:
        Logits [B, S, V].

    Raises:
        SecateurError: What comes back is not of this form.
    """
    weight = next(model.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    if not hasattr(model, "config"):
        out = (
            model(batch.to(device))
            if isinstance(batch, torch.Tensor)
            else model(**{name: value.to(device) for name, value in batch.items()})
        )
    else:
        named = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        if not _is_encoder_decoder(model):
            named.pop("labels", None)
        options = {"use_cache": False} if _takes(model, "use_cache") else {}
        out = model(**{name: value.to(device) for name, value in named.items()}, **options)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        shape = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SecateurError(
            f"{type(model).__name__} must return logits [B, S, V], as a tensor or an output with .logits; "
            f"it returned {shape}"
        )
    return logits


def perplexity(model: nn.Module, batches: Sequence[Batch], track: Track = quiet) -> float:
    """Measure exp(mean next-token loss) over all predicted tokens, each row on its own.

    Positions whose ``attention_mask`` is 0 or whose label is -100 count for nothing. The loss is taken in float32, in
    chunks of positions: there is no float32 copy of all logits.

    Args:
        model: A language model; it is put into evaluation mode meanwhile.
        batches: Token ids int64 [B, S], or mappings with ``input_ids`` [B, S].
        track: Progress over the batches.

    Returns:
        The perplexity: 1 at best, the size of the vocabulary for a uniform guess, infinity when a float overflows.

    Raises:
        SecateurError: No token is predicted, or the logits are NaN.
    """
    loss, tokens = 0.0, 0
    own = _some(batches)
    with world.as_one(), evaluating(model), torch.inference_mode():
        for index, batch in enumerate(track(own, "perplexity")):
            batch_loss, batch_tokens = _loss(model, logits_of(model, batch), batch, index)
            loss, tokens = loss + batch_loss, tokens + batch_tokens
    whole, count = _over_all(loss, tokens)
    return _perplexity(whole, int(count))


class Reference:
    """The dense model's logits over fixed batches: what `compare` holds a pruned model against.

    They are kept in memory when they fit under `limit_bytes`, and computed again for each comparison otherwise. Then
    the dense model must stay as it is: `compare` finds out when it was changed in place.

    Attributes:
        batches: What was measured; of data that is split among processes, this one's share.
        perplexity: The dense model's perplexity over all that was measured.
        tokens: Predicted tokens in it.
        kept: Whether the logits are in memory.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], *, limit_bytes: int = 2**30, track: Track = quiet
    ) -> None:
        """Run the dense model once.

        Args:
            model: The dense model.
            batches: Token ids int64 [B, S], or mappings with ``input_ids`` [B, S].
            limit_bytes: Memory for the logits, in their own dtype and on the model's device.
            track: Progress over the batches.

        Raises:
            SecateurError: No token is predicted, or the logits are NaN.
        """
        self.batches = _some(batches)
        self._logits: list[torch.Tensor] = []
        self._losses: list[float] = []
        size, self.kept, self.tokens = 0, True, 0
        with world.as_one(), evaluating(model), torch.inference_mode():
            for index, batch in enumerate(track(self.batches, "dense reference")):
                logits = logits_of(model, batch)
                loss, tokens = _loss(model, logits, batch, index)
                self._losses.append(loss)
                self.tokens += tokens
                size += logits.numel() * logits.element_size()
                self.kept = size <= limit_bytes
                if self.kept:
                    self._logits.append(logits)
                else:
                    self._logits.clear()
        whole, count = _over_all(sum(self._losses), self.tokens)
        self.tokens = int(count)
        self.perplexity = _perplexity(whole, self.tokens)
        self._model = None if self.kept else model

    def logits(self, index: int) -> torch.Tensor:
        """Return the dense logits [B, S, V] of one batch.

        Raises:
            SecateurError: They were not kept, and the dense model is no longer what it was.
        """
        if self._model is None:
            return self._logits[index]
        with evaluating(self._model), torch.inference_mode():
            logits = logits_of(self._model, self.batches[index])
            loss, _ = _loss(self._model, logits, self.batches[index], index)
        # Threads and batch order may move the last digits of a sum, a cut moves the first ones.
        if not math.isclose(loss, self._losses[index], rel_tol=1e-4, abs_tol=1e-6):
            raise SecateurError(
                f"the dense {type(self._model).__name__} has changed since its reference was taken "
                f"(loss of batch {index}: {self._losses[index]:.6g} then, {loss:.6g} now); "
                "prune a copy, or raise limit_bytes to keep the logits"
            )
        return logits


@dataclass(frozen=True)
class Comparison:
    """How far a model is from the dense one, over the same tokens.

    Attributes:
        perplexity: Of the model.
        dense_perplexity: Of the dense model.
        kl: Mean over the predicted tokens of KL(dense || model), in nats.
        top1: Share of the predicted tokens where both models have the same first choice, in [0, 1].
        tokens: Predicted tokens.
    """

    perplexity: float
    dense_perplexity: float
    kl: float
    top1: float
    tokens: int


def compare(model: nn.Module, reference: Reference, track: Track = quiet) -> Comparison:
    """Measure `model` against the dense model of `reference`, on the reference's batches.

    Args:
        model: A language model with the dense model's vocabulary; it is put into evaluation mode meanwhile.
        reference: The dense model's side.
        track: Progress over the batches.

    Raises:
        SecateurError: The vocabularies differ, the logits are NaN, or the dense model was changed in place.
    """
    with world.as_one():
        own = _sums_against(model, reference, track)
    loss, kl, agree, tokens = _over_all(*own)
    return Comparison(_perplexity(loss, int(tokens)), reference.perplexity, kl / tokens, agree / tokens, int(tokens))


def _over_all(*sums: float) -> tuple[float, ...]:
    """Sums over all processes, where data is split among them."""
    if not world.split():
        return sums
    found = torch.tensor(sums, dtype=torch.float64)
    world.add_up([found])
    return tuple(found.tolist())


def _sums_against(model: nn.Module, reference: Reference, track: Track) -> tuple[float, float, float, float]:
    """Loss, KL and equal first choices, summed over the predicted tokens, and how many those are."""
    loss = kl = agree = 0.0
    tokens = 0
    for index, batch in enumerate(track(reference.batches, "comparing with the dense model")):
        dense = reference.logits(index)
        with evaluating(model), torch.inference_mode():
            logits = logits_of(model, batch)
            if logits.shape != dense.shape:
                raise SecateurError(
                    f"{type(model).__name__} has logits of shape {list(logits.shape)} in batch {index}, "
                    f"but the dense model {list(dense.shape)}: only models with the same vocabulary can be compared"
                )
            targets = _targets(batch, _is_encoder_decoder(model), dense.shape[1])
            for target_T, model_TV, dense_TV in _chunks(targets, logits, dense):
                losses_T, log_TV = _token_losses(model_TV, target_T)
                _reject_nan(type(model).__name__, losses_T, index)
                dense_log_TV = log_softmax(dense_TV.float(), dim=-1)
                share_TV = dense_log_TV.exp()
                # A token that the dense model rules out (a logit of -inf) has a share of 0, and 0 log 0 = 0.
                terms_TV = torch.where(share_TV > 0, share_TV * (dense_log_TV - log_TV), 0.0)
                kl += float(terms_TV.sum(dtype=torch.float64))
                agree += float((model_TV.argmax(-1) == dense_TV.argmax(-1)).sum())
                loss += float(losses_T.sum(dtype=torch.float64))
                tokens += len(target_T)
    return loss, kl, agree, tokens


def row_sums(
    model: nn.Module, batch: Batch, index: int, logits: torch.Tensor, dense: torch.Tensor | None = None
) -> torch.Tensor:
    """What the predicted tokens of each row add up to: float64 [B, 7], in the order of `SUMS`.

    Args:
        model: A language model.
        batch: Token ids int64 [B, S], or a mapping.
        index: The number of the batch, for messages.
        logits: What the model gives for it, [B, S, V].
        dense: What the dense model gives for it; NaN stands in the columns that need it, where there is none.

    Raises:
        SecateurError: The vocabularies differ, or logits are NaN.
    """
    if dense is not None and logits.shape != dense.shape:
        raise SecateurError(
            f"the model has logits of shape {list(logits.shape)} in batch {index}, but the dense model "
            f"{list(dense.shape)}: only models with the same vocabulary can be compared"
        )
    found = torch.zeros(len(logits), len(SUMS), dtype=torch.float64)
    targets = _targets(batch, _is_encoder_decoder(model), logits.shape[1])
    for row in range(len(logits)):
        both = [x[row : row + 1] for x in (logits, dense) if x is not None]
        for target_T, model_TV, *dense_TV in _chunks(targets[row : row + 1], *both):
            sums_T = prediction_sums(model_TV, target_T, dense_TV[0] if dense_TV else None)
            _reject_nan(type(model).__name__, sums_T[:, SUMS.index("loss")], index)
            if dense is not None:
                _reject_nan("the dense model", sums_T[:, SUMS.index("dense_loss")], index)
            found[row] += sums_T.sum(0).cpu()
    return found


SUMS = ("count", "loss", "hits", "dense_loss", "dense_hits", "kl", "agree")
"""What `row_sums` adds up: predictions; losses in nats and right first choices of the model and of the dense one;
KL(dense || model) in nats; equal first choices."""


def prediction_sums(logits_TV: torch.Tensor, target_T: torch.Tensor, dense_TV: torch.Tensor | None) -> torch.Tensor:
    """The measures of single predictions: float64 [T, 7], in the order of `SUMS`; NaN where there is no dense model."""
    losses_T, log_TV = _token_losses(logits_TV, target_T)
    first_T = logits_TV.argmax(-1)
    nothing_T = torch.full_like(losses_T, math.nan)
    columns = [torch.ones_like(losses_T), losses_T, first_T == target_T, *[nothing_T] * 4]
    if dense_TV is not None:
        dense_losses_T, dense_log_TV = _token_losses(dense_TV, target_T)
        share_TV, dense_first_T = dense_log_TV.exp(), dense_TV.argmax(-1)
        terms_TV = torch.where(share_TV > 0, share_TV * (dense_log_TV - log_TV), 0.0)
        kl_T = terms_TV.sum(-1, dtype=torch.float64)
        columns[3:] = [dense_losses_T, dense_first_T == target_T, kl_T, first_T == dense_first_T]
    return torch.stack([column.double() for column in columns], dim=1)


def _some(batches: Sequence[Batch]) -> Sequence[Batch]:
    if len(batches) == 0:
        raise SecateurError("there are no batches to measure on; give at least one")
    return shared(batches, "the data to measure on") if world.split() else batches


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _takes(model: nn.Module, option: str) -> bool:
    """Whether a Hugging Face model's forward has this option: some (Granite-MoE, XLNet) hide it in ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _targets(batch: Batch, encoder_decoder: bool, positions: int) -> torch.Tensor:
    """Return what each position has to predict, int64 [B, S], `_IGNORED` where nothing.

    Position t of a causal model predicts token t + 1; that of a decoder behind an encoder predicts label t.
    """
    ids = batch if isinstance(batch, torch.Tensor) else batch.get("labels", batch.get("input_ids"))
    if ids is None or ids.ndim != 2 or ids.shape[1] != positions:
        have = "nothing" if ids is None else f"shape {list(ids.shape)}"
        raise SecateurError(
            f"perplexity needs labels or input_ids [B, {positions}] for these logits; the batch has {have}"
        )
    if encoder_decoder:
        if isinstance(batch, torch.Tensor) or "labels" not in batch:
            raise SecateurError("an encoder-decoder model is measured on mappings with 'labels'")
        return ids
    targets = torch.full_like(ids, _IGNORED)
    targets[:, :-1] = ids[:, 1:]
    mask = None if isinstance(batch, torch.Tensor) else batch.get("attention_mask")
    if mask is not None:
        if mask.shape != ids.shape:
            raise SecateurError(
                f"attention_mask must have the shape of input_ids {list(ids.shape)}, not {list(mask.shape)}"
            )
        # Padding is not predicted, and (on the left) predicts nothing.
        real = mask.bool()
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), _IGNORED)
    return targets


def _chunks(targets: torch.Tensor, *logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield (targets [T], logits [T, V] of each model...) of the positions that count, T small, on one device."""
    device = logits[0].device
    step = max(1, _CHUNK_ELEMENTS // logits[0].shape[-1])
    for target_S, *rows_SV in zip(targets, *logits, strict=True):
        (places,) = torch.nonzero(target_S != _IGNORED, as_tuple=True)
        for start in range(0, len(places), step):
            some = places[start : start + step]
            yield target_S[some].to(device), *(row_SV[some.to(row_SV.device)].to(device) for row_SV in rows_SV)


def _token_losses(logits_TV: torch.Tensor, target_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token [T] and all log probabilities [T, V], in float32."""
    log_TV = log_softmax(logits_TV.float(), dim=-1)
    return -log_TV.gather(-1, target_T[:, None])[:, 0], log_TV


def _loss(model: nn.Module, logits: torch.Tensor, batch: Batch, index: int) -> tuple[float, int]:
    """Return the summed next-token loss of a batch, in nats, and the number of its predicted tokens."""
    loss, tokens = 0.0, 0
    targets = _targets(batch, _is_encoder_decoder(model), logits.shape[1])
    for target_T, chunk_TV in _chunks(targets, logits):
        losses_T, _ = _token_losses(chunk_TV, target_T)
        _reject_nan(type(model).__name__, losses_T, index)
        loss += float(losses_T.sum(dtype=torch.float64))
        tokens += len(target_T)
    return loss, tokens


def _reject_nan(who: str, losses_T: torch.Tensor, index: int) -> None:
    # One NaN or +inf among a token's logits makes its loss NaN.
    bad = int(losses_T.isnan().sum())
    if bad:
        raise SecateurError(
            f"{who}: {bad} of {len(losses_T)} tokens in batch {index} have NaN or infinite logits; "
            "look for weights that are not finite, or run it in float32 or bfloat16"
        )


def _perplexity(loss: float, tokens: int) -> float:
    if tokens == 0:
        raise SecateurError("the batches predict no token: rows need at least 2 tokens that are not masked")
    mean = loss / tokens
    return math.exp(mean) if mean < 709 else math.inf  # above, a double overflows


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        name: For reports.
        function: model -> number.
        higher_is_better: Its direction.
    """

    name: str
    function: Callable[[nn.Module], float]
    higher_is_better: bool

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`."""
        return a > b if self.higher_is_better else a < b


def perplexity_metric(batches: Sequence[Batch]) -> Metric:
    """Return `perplexity` over these batches as a metric; lower is better."""
    return Metric("perplexity", lambda model: perplexity(model, batches), higher_is_better=False)


def choice_metric(
    tokenizer: Tokenizer, questions: Sequence["Question"], *, shots: int = 0, batch_size: int = 8
) -> Metric:
    """Return multiple-choice accuracy (see `secateur.measure.choice`) as a metric; higher is better."""
    from secateur.measure.choice import choice_accuracy  # it needs logits_of from here

    def accuracy(model: nn.Module) -> float:
        return choice_accuracy(model, tokenizer, questions, shots=shots, batch_size=batch_size)

    return Metric("choice accuracy", accuracy, higher_is_better=True)


def load_metric(spec: str) -> Metric:
    """Import a metric of the user's own: a function model -> number, where higher is better.

    Args:
        spec: ``module:function``; the module must be importable.

    Raises:
        SecateurError: There is no such module or function, or, when it is measured, its result is no finite number.
    """
    function = find_function(spec, "metric", "my_metrics:accuracy")

    def measured(model: nn.Module) -> float:
        try:
            value = function(model)
        except Exception as error:  # whatever the user's own code raises
            raise SecateurError(f"metric {spec!r} failed: {type(error).__name__}: {error}") from error
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SecateurError(f"metric {spec!r} returned {type(value).__name__}, not a number") from error
        if not math.isfinite(number):
            raise SecateurError(f"metric {spec!r} returned {number}, not a finite number")
        return number

    return Metric(spec, measured, higher_is_better=True)
