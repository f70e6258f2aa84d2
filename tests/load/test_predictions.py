"""Which outputs of which models are predictions, and of what."""

from typing import Any

import heal
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.errors import SecateurError
from secateur.load.predictions import IGNORED, predictions
from secateur.measure.quality import Reference, compare, perplexity
from secateur.train.objective import EVALUATED_TOP_K, Quality
from secateur.train.teacher import Live, forward


def found(model: Any, batch: Any) -> tuple[torch.Tensor, list[int] | None, list[int] | None]:
    """Rows that count, their places, and targets."""
    with torch.no_grad():
        output, _, _ = forward(model, batch)
    said = predictions(model, batch, output)
    places = None if said.places is None else said.places.tolist()
    assert said.count == len(said.some(slice(None)))
    return said.some(slice(None)), places, None if said.targets is None else said.targets.tolist()


@pytest.mark.parametrize("left", [True, False])
def test_causal_models(left: bool) -> None:
    model, ids = heal.llama(), heal.rows(2, 4)
    _, places, targets = found(model, ids)
    assert places == [0, 1, 2, 4, 5, 6]
    assert targets == [*ids[0, 1:].tolist(), *ids[1, 1:].tolist()]
    batch = heal.padded(ids, left)  # rows of 3 and 2 tokens
    _, places, targets = found(model, batch)
    assert places == ([1, 2, 6] if left else [0, 1, 4])
    kept = [1, 2] if left else [0, 1]
    assert targets == [*(int(ids[0, t + 1]) for t in kept), int(ids[1, 3 if left else 1])]


def test_labels_of_causal_models() -> None:
    model, ids = heal.llama(), heal.rows(2, 4)
    labels = ids.clone()
    labels[0, :3] = IGNORED  # a prompt
    _, places, targets = found(model, {"input_ids": ids, "labels": labels})
    assert places == [2, 4, 5, 6]
    assert targets == [int(ids[0, 3]), *ids[1, 1:].tolist()]


def bert(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=heal.VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, **options,
    )  # fmt: skip
    return kind(config).eval()


def test_masked_language_models_predict_where_they_are() -> None:
    model, ids = bert(BertForMaskedLM), heal.rows(2, 4)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2], labels[1, 0] = 7, 9
    _, places, targets = found(model, {"input_ids": ids, "labels": labels})
    assert (places, targets) == (None, labels.flatten().tolist())
    batch = {**heal.padded(ids), "labels": labels}
    _, places, targets = found(model, batch)
    assert places == [0, 1, 2, 4, 5]
    assert targets == [IGNORED, IGNORED, 7, 9, IGNORED]
    with torch.no_grad():
        expected = torch.exp(model(**batch).loss)
    assert Quality([batch])(model)["perplexity"] == pytest.approx(float(expected), rel=1e-5)


def test_classifiers_of_text() -> None:
    model = bert(BertForSequenceClassification, num_labels=3)
    batch = {**heal.padded(heal.rows(2, 4)), "labels": torch.tensor([2, 0])}
    rows, places, targets = found(model, batch)
    assert (list(rows.shape), places, targets) == ([2, 3], None, [2, 0])
    told = Quality([batch])(model)
    with torch.no_grad():
        out = model(**batch)
    assert told["loss"] == pytest.approx(float(out.loss), rel=1e-5)
    assert told["accuracy"] == float((out.logits.argmax(-1) == batch["labels"]).float().mean())


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=heal.VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def test_models_behind_an_encoder() -> None:
    """Labels and the encoder's tokens have the same length, so that its mask could be taken for the decoder's."""
    model = t5()
    labels = heal.rows(2, 4, seed=8)
    labels[0, 3:] = IGNORED
    batch: dict[str, torch.Tensor] = {**heal.padded(heal.rows(2, 4), left=True), "labels": labels}
    _, places, targets = found(model, batch)
    assert places == [0, 1, 2, 4, 5, 6, 7]
    assert targets == [x for x in labels.flatten().tolist() if x != IGNORED]
    with torch.no_grad():
        expected = torch.exp(model(**batch).loss)
    assert Quality([batch])(model)["perplexity"] == pytest.approx(float(expected), rel=1e-5)
    started = {key: value for key, value in batch.items() if key != "labels"} | {"decoder_input_ids": heal.rows(2, 4)}
    assert found(model, started)[1:] == (None, None)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert found(model, {**started, "decoder_attention_mask": mask})[1] == [0, 1, 4, 5, 6, 7]


def test_pairs() -> None:
    model, (x, y) = heal.net(), heal.pictures(3)
    rows, places, targets = found(model, [x, y])
    assert (list(rows.shape), places, targets) == ([3, 5], None, y.tolist())
    masks = torch.randint(0, 6, (3, 5, 5), generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Conv2d(3, 6, 1)  # segmentation: classes are the second dimension
    rows, _, targets = found(whole, (x, masks))
    with torch.no_grad():
        assert torch.equal(rows, whole(x).permute(0, 2, 3, 1).reshape(-1, 6))
    assert targets == masks.flatten().tolist()
    tokens = (torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64))  # classes are the last
    assert list(found(torch.nn.Linear(3, 6), tokens)[0].shape) == [8, 6]


def test_numbers_as_targets_are_no_targets() -> None:
    linear = torch.nn.Linear(3, 6)
    rows, places, targets = found(linear, (torch.ones(2, 4, 3), torch.ones(2, 4, 6)))
    assert (list(rows.shape), places, targets) == ([8, 6], None, None)
    one = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    assert list(found(one, (torch.ones(5, 3), torch.ones(5)))[0].shape) == [5, 1]


def test_targets_that_do_not_fit() -> None:
    with pytest.raises(SecateurError, match="there are 2 targets for 3 predictions"):
        found(heal.net(), (heal.pictures(3)[0], torch.zeros(2, dtype=torch.int64)))


def batches(kind: str) -> list[Any]:
    ids = heal.rows(6)
    if kind == "rows":
        return [ids[:4], ids[4:]]
    if kind == "labels":
        labels = ids.clone()
        labels[:, :3] = IGNORED
        return [{"input_ids": ids, "labels": labels}]
    return [heal.padded(ids, left=kind == "left")]


@pytest.mark.parametrize("kind", ["rows", "left", "right", "labels"])
@pytest.mark.parametrize("vocabulary", [heal.VOCAB, 200])
def test_quality_is_that_of_measure(kind: str, vocabulary: int) -> None:
    dense, model = heal.llama(vocab_size=vocabulary), heal.llama(seed=3, vocab_size=vocabulary)
    told = Quality(batches(kind), Live(dense, 1.0, EVALUATED_TOP_K, {}))(model)
    assert told["perplexity"] == pytest.approx(perplexity(model, batches(kind)), rel=1e-5)
    full = compare(model, Reference(dense, batches(kind))).kl
    assert told["kl"] <= full + 1e-5
    if vocabulary <= EVALUATED_TOP_K:
        assert told["kl"] == pytest.approx(full, abs=1e-3)
    else:
        assert told["kl"] > 0.3 * full
