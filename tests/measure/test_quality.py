"""Perplexity, KL and metrics against slow versions that share no code with them."""

import math
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.errors import SecateurError
from secateur.measure import quality
from secateur.measure.quality import (
    Batch,
    Metric,
    Reference,
    compare,
    load_metric,
    logits_of,
    perplexity,
    perplexity_metric,
)

VOCAB = 31


def tiny_llama(seed: int = 0, scale: float = 8.0) -> nn.Module:
    """A model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.5,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(scale / 0.02 / 16)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def slow_losses(model: nn.Module, row: list[int]) -> list[float]:
    """The loss of each next token of one row: one prefix at a time, in float64."""
    losses = []
    for end in range(1, len(row)):
        with torch.no_grad():
            logits = model(torch.tensor([row[:end]])).logits[0, -1].double()
        losses.append(-math.log(float(logits.softmax(-1)[row[end]])))
    return losses


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("chunk", [2**22, 3 * VOCAB, 1])
def test_perplexity_is_the_mean_over_all_predicted_tokens(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", chunk)
    model = tiny_llama()
    batches = [tokens(3, 9), tokens(1, 5)]  # of different sizes: a mean of means would be another number
    expected = math.exp(mean([loss for batch in batches for row in batch.tolist() for loss in slow_losses(model, row)]))
    assert expected > 2 * VOCAB or expected < VOCAB / 2  # not just a uniform guess
    assert perplexity(model, batches) == pytest.approx(expected, rel=1e-5)


def test_masks_and_labels_are_respected() -> None:
    model = tiny_llama()
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    rows = [ids[0, :5].tolist(), ids[1].tolist()]
    expected = math.exp(mean([loss for row in rows for loss in slow_losses(model, row)]))
    assert perplexity(model, [{"input_ids": ids, "attention_mask": mask}]) == pytest.approx(expected, rel=1e-5)

    labels = ids.clone()
    labels[:, :4] = -100  # an instruction that is only read
    expected = math.exp(mean([loss for row in ids.tolist() for loss in slow_losses(model, row)[3:]]))
    batch = {"input_ids": ids, "labels": labels}
    assert perplexity(model, [batch]) == pytest.approx(expected, rel=1e-5)
    assert set(batch) == {"input_ids", "labels"}  # the caller's mapping stays whole


def test_padding_on_the_left_predicts_nothing() -> None:
    ids = tokens(1, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    targets = quality._targets({"input_ids": ids, "attention_mask": mask}, False, 7)
    assert targets.tolist() == [[-100, -100, *ids[0, 3:].tolist(), -100]]


def test_encoder_decoders_predict_their_labels() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model: nn.Module = T5ForConditionalGeneration(config).eval()
    ids, labels = tokens(2, 9), tokens(2, 6)
    labels[0, 4:] = -100
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=ids, labels=labels).loss))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert perplexity(model, [batch]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SecateurError, match="mappings with 'labels'"):
        perplexity(model, [{"input_ids": ids, "decoder_input_ids": ids}])


class Table(nn.Module):
    """A plain PyTorch bigram model, which calls its input by a name of its own and returns a tensor."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.modes: list[bool] = []
        self.grad: list[bool] = []

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        self.grad.append(torch.is_grad_enabled())
        return self.table[symbols]


def test_logits_of_plain_and_hugging_face_models() -> None:
    table = torch.randn(VOCAB, VOCAB)
    ids = tokens(2, 4)
    assert torch.equal(logits_of(Table(table), ids), table[ids])
    assert torch.equal(logits_of(Table(table), {"symbols": ids}), table[ids])
    model = tiny_llama()
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    logits = logits_of(model, ids)
    assert logits.shape == (2, 4, VOCAB)
    assert torch.equal(logits, logits_of(model, {"input_ids": ids, "labels": ids}))
    assert [sorted(kwargs) for kwargs in seen] == [["input_ids", "use_cache"]] * 2
    assert not seen[0]["use_cache"]


def test_models_that_hide_use_cache_in_kwargs_run_without_one() -> None:
    config = GraniteMoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model: nn.Module = GraniteMoeForCausalLM(config).eval()
    outputs: list[Any] = []
    model.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    logits_of(model, tokens(1, 4))
    assert outputs[0].past_key_values is None


def test_models_that_return_something_else_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"Embedding must return logits.*it returned shape \[4, 3\]"):
        logits_of(nn.Embedding(VOCAB, 3), tokens(4))
    with pytest.raises(SecateurError, match=r"GRU must return logits.*it returned tuple"):
        logits_of(nn.GRU(3, 3), torch.zeros(2, 4, 3))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Table(torch.randn(VOCAB, VOCAB)), nn.Dropout())
    model.train()
    model[1].eval()
    reference = Reference(model, [tokens(2, 4)])
    perplexity(model, [tokens(2, 4)])
    compare(model, reference)
    assert [module.training for module in model.modules()] == [True, True, False]
    table = model[0]
    assert isinstance(table, Table)
    assert table.modes == [False] * 3
    assert table.grad == [False] * 3


def slow_comparison(dense: nn.Module, model: nn.Module, batches: list[torch.Tensor]) -> tuple[float, float]:
    """KL by torch.distributions and agreement, token by token, in float64."""
    kl, agree = [], []
    for row in [row for batch in batches for row in batch]:
        with torch.no_grad():
            pairs = zip(dense(row[None]).logits[0, :-1].double(), model(row[None]).logits[0, :-1].double(), strict=True)
        for of_dense, of_model in pairs:
            p = torch.distributions.Categorical(logits=of_dense)
            q = torch.distributions.Categorical(logits=of_model)
            kl.append(float(torch.distributions.kl_divergence(p, q)))
            agree.append(float(of_dense.argmax() == of_model.argmax()))
    return mean(kl), mean(agree)


@pytest.mark.parametrize("limit", [2**30, 0, 2 * 8 * VOCAB * 4 + 1])
def test_compare(limit: int) -> None:
    dense, model = tiny_llama(), tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(40)
    batches = [tokens(2, 8), tokens(3, 6)]
    reference = Reference(dense, batches, limit_bytes=limit)
    assert reference.kept == (limit == 2**30)
    assert len(reference._logits) == (2 if reference.kept else 0)
    result = compare(model, reference)
    kl, agree = slow_comparison(dense, model, batches)
    assert kl > 0.01
    assert 0.1 < agree < 1
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.top1 == pytest.approx(agree)
    assert result.tokens == reference.tokens == 2 * 7 + 3 * 5
    assert result.perplexity == pytest.approx(perplexity(model, batches), rel=1e-6)
    assert result.dense_perplexity == reference.perplexity == pytest.approx(perplexity(dense, batches), rel=1e-6)
    same = compare(dense, reference)
    assert (same.kl, same.top1) == (0.0, 1.0)
    assert same.perplexity == pytest.approx(reference.perplexity)


def test_kl_with_tokens_that_both_models_rule_out() -> None:
    table = torch.zeros(4, 4)
    table[:, 3] = -torch.inf
    other = table.clone()
    other[:, 0] = math.log(2.0)
    ids = torch.tensor([[0, 1, 2, 0]])
    result = compare(Table(other), Reference(Table(table), [ids]))
    assert result.kl == pytest.approx(sum(math.log(1 / 3 / q) / 3 for q in (0.5, 0.25, 0.25)), rel=1e-5)


def test_a_reference_notices_that_its_model_was_cut_in_place() -> None:
    model = tiny_llama()
    kept, recomputed = Reference(model, [tokens(2, 8)]), Reference(model, [tokens(2, 8)], limit_bytes=0)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(40)
    assert compare(model, kept).kl > 0.01
    with pytest.raises(SecateurError, match=r"the dense LlamaForCausalLM has changed.*prune a copy"):
        compare(model, recomputed)


def test_quality_mistakes() -> None:
    model = tiny_llama()
    with pytest.raises(SecateurError, match="no batches"):
        perplexity(model, [])
    with pytest.raises(SecateurError, match="predict no token"):
        perplexity(model, [tokens(3, 1)])
    with pytest.raises(SecateurError, match=r"needs labels or input_ids \[B, 4\].*has nothing"):
        perplexity(Table(torch.randn(VOCAB, VOCAB)), [{"symbols": tokens(2, 4)}])
    ids = tokens(2, 4)
    masked = {"input_ids": ids, "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}
    with pytest.raises(SecateurError, match=r"attention_mask must have the shape of input_ids \[2, 4\]"):
        perplexity(model, [masked])
    reference = Reference(Table(torch.zeros(VOCAB, VOCAB + 1)), [ids])
    with pytest.raises(SecateurError, match="same vocabulary"):
        compare(Table(torch.zeros(VOCAB, VOCAB)), reference)
    table = torch.zeros(VOCAB, VOCAB)
    table[int(ids[1, 2])] = torch.nan
    bad: list[Batch] = [tokens(1, 2) * 0, ids]
    table[0] = 0.0
    with pytest.raises(SecateurError, match="Table: 1 of 3 tokens in batch 1 have NaN or infinite logits"):
        perplexity(Table(table), bad)
    with pytest.raises(SecateurError, match="NaN or infinite logits"):
        compare(Table(table), Reference(Table(torch.zeros(VOCAB, VOCAB)), bad))


def test_perplexity_beyond_a_double_is_infinite() -> None:
    table = torch.full((2, 2), -2000.0).fill_diagonal_(0.0)
    assert perplexity(Table(table), [torch.tensor([[0, 1, 0, 1]])]) == math.inf


def test_metrics() -> None:
    dense, batches = tiny_llama(), [tokens(2, 8)]
    ppl = perplexity_metric(batches)
    assert ppl.function(dense) == perplexity(dense, batches)
    assert ppl.better(1.0, 2.0)
    assert not ppl.better(2.0, 2.0)
    high = Metric("accuracy", lambda _: 1.0, higher_is_better=True)
    assert high.better(0.2, 0.1)
    assert not high.better(0.1, 0.2)


def test_load_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("my_metrics")
    module.score = lambda model: torch.tensor(len(list(model.parameters())) / 2)
    module.broken = lambda _model: math.nan
    module.text = lambda _model: "good"
    module.number = 3
    monkeypatch.setitem(__import__("sys").modules, "my_metrics", module)
    metric = load_metric("my_metrics:score")
    assert metric.name == "my_metrics:score"
    assert metric.higher_is_better
    assert metric.function(nn.Linear(2, 2)) == 1.0
    for spec, message in [
        ("my_metrics", "must read module:function"),
        (":score", "must read module:function"),
        ("my_metrixx:score", "no module 'my_metrixx'"),
        ("json.nothing:score", "no module 'json.nothing'"),
        ("my_metrics:scor", "has no 'scor'; did you mean 'score'"),
        ("my_metrics:number", "'number' is int, not a function"),
    ]:
        with pytest.raises(SecateurError, match=message):
            load_metric(spec)
    with pytest.raises(SecateurError, match="my_metrics:broken' returned nan, not a finite number"):
        load_metric("my_metrics:broken").function(nn.Linear(2, 2))
    with pytest.raises(SecateurError, match="returned str, not a number"):
        load_metric("my_metrics:text").function(nn.Linear(2, 2))


def test_a_metric_that_misses_a_module_of_its_own_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "needy_metrics.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SecateurError, match="needy_metrics needs a module 'not_installed_anywhere'"):
        load_metric("needy_metrics:score")
