"""Minitron end to end on tiny models: exact dims, budgets, the choice among candidates, and every refusal."""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload, costs
from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.cut.config import sizes_of
from secateur.errors import SecateurError
from secateur.load.model import fingerprint, sliding_window
from secateur.measure.quality import Metric, load_metric, perplexity, perplexity_metric
from secateur.methods.base import Decision
from secateur.methods.minitron import minitron
from secateur.methods.study import Study
from secateur.progress import quiet
from secateur.score.cache import Cache
from secateur.space import Space, discover

DATA = [tokens(2, 12, seed=1), tokens(2, 12, seed=2)]
SPACES: dict[int, tuple[nn.Module, Space]] = {}
LEAN: Mapping[str, Any] = {"score_samples": 2, "top_k": 2, "max_depth_cut": 0.0, "skip": ("hidden", "kv_groups")}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", dtype=torch.float32, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def thin() -> Any:
    """One layer: enough where none can go."""
    return tiny("llama", dtype=torch.float32, tie_word_embeddings=True, num_hidden_layers=1)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def gemma2() -> Any:
    return tiny("gemma2", dtype=torch.float32)


@pytest.fixture(scope="module")
def wide(llama: Any) -> Decision:
    """A search over all kinds at once."""
    budget = Budget.parse("params=60%")
    steps = {"layers": 1, "hidden": 16, "ffn": 16}
    return minitron(llama, budget, DATA, max_depth_cut=0.5, max_width_cut=0.5, top_k=3, score_samples=3, divisors=steps)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Space of a model that many tests share is the same every time."""

    def known(model: nn.Module) -> Space:
        if id(model) not in SPACES:
            SPACES[id(model)] = model, discover(model)
        return SPACES[id(model)][1]

    monkeypatch.setattr(sys.modules["secateur.methods.minitron"], "discover", known)


def lean(model: nn.Module, budget: str, **options: Any) -> Decision:
    return minitron(model, Budget.parse(budget), DATA, **{**LEAN, **options})


def exact(model: nn.Module, **dims: int) -> Decision:
    return minitron(model, Budget.parse(dims=dims), DATA, score_samples=2)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kept_by(score: torch.Tensor, size: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(range(len(score)), key=lambda u: -float(score[u]))[:size]))


# Exact dims


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        ({"hidden_size": 32, "intermediate_size": 40}, {"hidden": 32, "ffn": 40}),
        ({"ffn_hidden_size": 40}, {"ffn": 40}),
        ({"num_query_groups": 1}, {"kv_groups": 1, "heads": 2}),
        ({"num_key_value_heads": 1, "num_attention_heads": 1}, {"kv_groups": 1, "heads": 1}),
        ({"num_heads": 2}, {"heads": 2}),
        ({"num_layers": 1, "ffn": 40}, {"layers": 1, "ffn": 40}),
        ({"hidden_size": 48, "intermediate_size": 72}, {"ffn": 72}),
    ],
    ids=str,
)
def test_exact_dims_of_llama(llama: Any, dims: dict[str, int], sizes: dict[str, int]) -> None:
    decision = exact(llama, **dims)
    dense, after = sizes_of(decision.space), sizes_of(decision.space, decision.plan)
    for kind in ("hidden", "ffn", "heads", "kv_groups", "layers"):
        assert after.get(kind) == sizes.get(kind, dense.get(kind)), kind


def test_exact_dims_are_those_of_the_real_model(llama: Any) -> None:
    decision = exact(llama, hidden_size=32, ffn_hidden_size=56, num_query_groups=1, num_layers=1)
    pruned: Any = apply(llama, decision.plan, space=decision.space)
    config = pruned.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 56, 1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 12)
    assert len(pruned.model.layers) == 1
    assert pruned.model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
    depth = decision.details["depth_kl"]
    assert [entry[0] for entry in depth] == [1]
    assert depth[0][1] > 0


def test_exact_dims_of_gpt2_under_both_names(gpt2: Any) -> None:
    by_own = exact(gpt2, n_embd=36, n_head=3, n_inner=40, n_layer=1)
    pruned: Any = apply(gpt2, by_own.plan, space=by_own.space)
    config = pruned.config
    assert (config.n_embd, config.n_head, config.n_inner, config.n_layer) == (36, 3, 40, 1)
    by_other = exact(gpt2, hidden_size=36, num_attention_heads=3, ffn_hidden_size=40, num_layers=1)
    assert by_other.plan == by_own.plan
    groups = exact(gpt2, hidden_size=36, num_query_groups=3)  # each head has its own keys
    assert sizes_of(groups.space, groups.plan).heads == 3


def test_what_stays_is_what_scores_best(llama: Any) -> None:
    decision = exact(llama, intermediate_size=56)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, key=f"model.layers.{i}.mlp.ffn": seen.setdefault(key, []).append(args[0].detach())
        )
        for i, layer in enumerate(llama.model.layers)
    ]
    with torch.no_grad():
        for batch in DATA:
            llama(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert set(decision.plan.kept) == set(seen)
    for name, kept in decision.plan.kept.items():
        means = torch.cat([x.abs().mean(1) for x in seen[name]])
        assert kept.units == kept_by(means.square().sum(0).sqrt(), 56)


def test_a_sorted_model_keeps_its_first_units_unscored(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.methods.study.activation_scores", None)
    budget = Budget.parse(dims={"ffn": 40, "hidden_size": 24, "num_attention_heads": 2})
    plan = minitron(llama, budget, DATA, presorted=True).plan
    for kept in plan.kept.values():
        wanted = (0, 2) if kept.kind == "heads" else tuple(range(kept.size // 2))
        assert kept.units == wanted


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"hiden_size": 24}, "dims: the config has no size 'hiden_size'; did you mean 'hidden_size'?"),
        ({"hidden_size": 64}, "dims: hidden_size=64 is above the current size of 48"),
        ({"num_query_groups": 3}, "dims: num_query_groups=3 is above the current size of 2"),
        ({"ffn_hidden_size": 40, "intermediate_size": 48}, "dims: ffn is given twice, as 40 and 48"),
        ({"hidden_size": 48, "num_layers": 2}, "are the model's own: nothing would be cut"),
        ({"num_attention_heads": 3}, "dims: 3 heads are not divisible by 2 KV groups"),
        ({"num_attention_heads": 4, "num_query_groups": 1}, "dims: 4 heads over 1 KV groups are 4 in each, the model"),
        ({"hidden_size": 43}, "cannot describe hidden_size=43, .*: 4 heads do not divide a hidden size of 43"),
    ],
    ids=str,
)  # fmt: skip
def test_dims_that_do_not_fit(llama: Any, dims: dict[str, int], message: str) -> None:
    with pytest.raises(SecateurError, match=message.replace("?", r"\?")):
        exact(llama, **dims)


def test_gpt2_must_cut_hidden_and_heads_together(gpt2: Any) -> None:
    with pytest.raises(SecateurError) as caught:
        exact(gpt2, hidden_size=36)
    text = str(caught.value)
    assert text.startswith("dims: GPT2Config cannot describe n_embd=36, n_inner=80, n_head=4, n_layer=2")
    assert text.endswith(": with a fixed head dimension of 12, hidden must be 12 x heads")


def test_a_size_that_the_model_cannot_cut_is_named(llama: Any) -> None:
    config = tiny("llama", num_attention_heads=1, num_key_value_heads=1, device="meta")
    with pytest.raises(
        SecateurError, match="dims: the heads of this model cannot be cut, so num_heads=1 cannot be set"
    ):
        exact(config, num_heads=1)
    del llama


# Budgets


def test_a_wide_search_meets_the_budget_exactly_counted(llama: Any, wide: Decision) -> None:
    pruned = apply(llama, wide.plan, space=wide.space)
    chosen = next(c for c in wide.details["search"]["candidates"] if c["chosen"])
    assert count(pruned) == chosen["params"] <= 0.6 * count(llama)
    sizes = {k: getattr(pruned.config, k) for k in chosen["sizes"]}
    assert sizes == chosen["sizes"]


def test_candidates_come_in_the_order_of_the_proxy_and_the_best_score_wins(wide: Decision) -> None:
    search = wide.details["search"]
    found = search["candidates"]
    assert len(found) == 3 < search["feasible"]
    assert [c["expected_kl"] for c in found] == sorted(c["expected_kl"] for c in found)
    assert [c["chosen"] for c in found].count(True) == 1
    best = min(found, key=lambda c: c["score"])
    assert best["chosen"]
    assert (search["score"], search["higher_is_better"]) == ("kl", False)
    assert set(search["probes"]["weight"]) == {"hidden", "ffn", "heads", "kv_groups"}
    assert [n for n, _ in search["probes"]["depth_kl"]] == [1]
    assert wide.details["calibration"] == {"samples": 4, "tokens": 48, "score_samples": 3}
    assert set(wide.details["seconds"]) == {"scoring", "probing", "depth", "candidates"}
    json.dumps(wide.details, allow_nan=False)


def test_the_score_of_a_candidate_is_that_of_the_real_model(llama: Any, wide: Decision) -> None:
    study = Study(llama, wide.space, DATA, 3, Cache(None), quiet)
    chosen = next(c for c in wide.details["search"]["candidates"] if c["chosen"])
    assert study.kl(apply(llama, wide.plan, space=wide.space)) == pytest.approx(chosen["score"], rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_defaults_work_on_every_architecture(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    decision = minitron(model, Budget.parse("params=85%"), DATA, top_k=1, score_samples=2)
    pruned = apply(model, decision.plan, space=decision.space)
    assert count(pruned) <= 0.85 * count(model)


@pytest.mark.parametrize("text", ["active_params=90%", "params=31K", "params=30500.5"])
def test_counts_in_all_forms(thin: Any, text: str) -> None:
    decision = lean(thin, text, top_k=1)
    limit = {"active_params=90%": 0.9 * count(thin), "params=31K": 31000}.get(text, 30500.5)
    assert count(apply(thin, decision.plan, space=decision.space)) <= limit


def memory_of(model: Any, batch: int, positions: int) -> int:
    """Bytes of the weights and of the cache, counted on the model itself."""
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = 0
    for i, layer in enumerate(getattr(model, "model", model).layers):
        window = sliding_window(model.config)(f"model.layers.{i}.self_attn")
        seen = positions if window is None else min(window, positions)
        heads = layer.self_attn.k_proj.weight.shape[0] + layer.self_attn.v_proj.weight.shape[0]
        cache += batch * seen * heads * model.dtype.itemsize
    return weights + cache


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_memory_counts_weights_and_cache(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    dense = memory_of(model, 3, 100)
    options = {"kv_batch": 3, "kv_seq_len": 100, "skip": ("hidden",), "max_width_cut": 0.5}
    decision = lean(model, "memory=75%", top_k=1, **options)
    after = memory_of(apply(model, decision.plan, space=decision.space), 3, 100)
    assert after == decision.details["search"]["candidates"][0]["memory"] <= 0.75 * dense
    assert sizes_of(decision.space, decision.plan).kv_groups == 1  # no other way to make so much of it go


def test_all_limits_hold_at_once(thin: Any) -> None:
    options = {"kv_batch": 1, "kv_seq_len": 64, "skip": ("hidden",), "max_width_cut": 0.5}
    decision = lean(thin, "params=90%, memory=75%", **options)
    for entry in decision.details["search"]["candidates"]:
        assert entry["params"] <= 0.9 * count(thin)
        assert entry["memory"] <= 0.75 * memory_of(thin, 1, 64)
    loose = lean(thin, "params=90%", **options)
    assert loose.details["search"]["feasible"] > decision.details["search"]["feasible"] > 0


def test_the_same_call_gives_the_same_plan_and_leaves_the_model_alone(thin: Any) -> None:
    before = fingerprint(thin)
    state = torch.get_rng_state()
    first, second = lean(thin, "params=90%"), lean(thin, "params=90%")
    assert first.plan == second.plan
    assert first.details["search"] == second.details["search"]
    assert fingerprint(thin) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in thin.modules())


def test_skipped_kinds_and_divisors(thin: Any) -> None:
    steps = {"intermediate_size": 16, "hidden": 8}
    decision = lean(thin, "params=85%", top_k=50, skip=("num_attention_heads", "kv_groups"), divisors=steps)
    found = [c["sizes"] for c in decision.details["search"]["candidates"]]
    assert {c["intermediate_size"] for c in found} <= {80, 64, 48}
    assert {c["hidden_size"] for c in found} <= {48, 40, 32}
    assert len({c["hidden_size"] for c in found}) > 1
    assert {(c["num_attention_heads"], c["num_key_value_heads"], c["num_hidden_layers"]) for c in found} == {(4, 2, 1)}


# What scores the candidates


def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("activation_scores", "probe_kinds", "drop_layers"):
        monkeypatch.setattr(f"secateur.methods.study.{name}", None)


def test_a_second_budget_needs_no_scoring_pass(thin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = lean(thin, "params=88%", skip=("hidden", "kv_groups", "heads"))
    lean(thin, "params=90%", skip=("hidden", "kv_groups", "heads"), cache=tmp_path)
    forbidden(monkeypatch)
    passes: list[int] = []

    def count_passes(_: Any, __: Any, output: Any) -> None:
        if type(output.logits) is torch.Tensor:  # tracing runs on fake ones
            passes.append(1)

    hook = thin.register_forward_hook(count_passes)
    again = lean(
        thin, "params=88%", skip=("hidden", "kv_groups", "heads"), cache=tmp_path,
        score=Metric("size", lambda m: -float(count(m)), higher_is_better=True),
    )  # fmt: skip
    hook.remove()
    assert passes == []
    found, wanted = (d.details["search"]["candidates"] for d in (again, fresh))
    assert [c["sizes"] for c in found] == [c["sizes"] for c in wanted]
    assert [c["expected_kl"] for c in found] == [c["expected_kl"] for c in wanted]


@pytest.mark.parametrize("higher", [True, False])
def test_the_metric_decides_in_its_own_direction(thin: Any, higher: bool) -> None:
    metric = Metric("params", lambda m: float(count(m)), higher_is_better=higher)
    search = lean(thin, "params=90%", score=metric, top_k=4).details["search"]
    values = [c["score"] for c in search["candidates"]]
    assert values == [c["params"] for c in search["candidates"]]
    assert next(c for c in search["candidates"] if c["chosen"])["score"] == (max if higher else min)(values)
    assert len(set(values)) > 1


def test_perplexity_as_the_score(thin: Any) -> None:
    decision = lean(thin, "params=90%", score=perplexity_metric(DATA))
    chosen = next(c for c in decision.details["search"]["candidates"] if c["chosen"])
    assert decision.details["search"]["score"] == "perplexity"
    assert chosen["score"] == perplexity(apply(thin, decision.plan, space=decision.space), DATA)


def test_a_function_of_the_users_own(thin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text("def narrow(model):\n    return -model.config.intermediate_size\n")
    monkeypatch.syspath_prepend(tmp_path)
    search = lean(thin, "params=92%", score=load_metric("my_scores:narrow"), top_k=4).details["search"]
    chosen = next(c for c in search["candidates"] if c["chosen"])
    assert chosen["sizes"]["intermediate_size"] == min(c["sizes"]["intermediate_size"] for c in search["candidates"])
    assert (search["score"], search["higher_is_better"]) == ("my_scores:narrow", True)


class NoConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        del use_cache
        result: torch.Tensor = self.out(self.table(input_ids))
        return result


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("latency=5ms", {}, "a budget of latency is not served by minitron: it takes params, active_params, memory"),
        ("params=70%,flops=1B", {}, "a budget of flops is not served by minitron"),
        ("n:m=2:4", {}, "a budget of n:m is not served by minitron"),
        ("params=70%,n:m=2:4", {}, "a budget of n:m is not served by minitron"),
        ("", {}, "no budget and no dims are given: it takes params, active_params, memory, or exact dims"),
        ("params=70%", {"top_k": 0}, "top_k must be at least 1, not 0"),
        ("params=70%", {"max_width_cut": 1.0}, "max_width_cut must be at least 0 and below 1, not 1.0"),
        ("params=70%", {"max_depth_cut": -0.1}, "max_depth_cut must be at least 0 and below 1, not -0.1"),
        ("params=70%", {"max_width_cut": float("nan")}, "max_width_cut must be at least 0 and below 1, not nan"),
        ("params=70%", {"skip": ("hidde",)}, "skip: there is no kind 'hidde'; did you mean 'hidden'?"),
        ("params=70%", {"divisors": {"fnn": 8}}, "divisors: there is no kind 'fnn'; did you mean 'ffn'?"),
        ("params=70%", {"divisors": {"ffn": 0}}, "the divisor of ffn must be at least 1, not 0"),
        ("params=70%", {"divisors": {"heads": 2}, "skip": ("heads",)}, "heads is both skipped and given a divisor"),
        ("params=10%", {}, "the budget cannot be met (params="),
        ("params=70%", {"score_samples": 0}, "score_samples must be at least 1, not 0"),
        ("params=70%", {"measure": False, "top_k": 3}, "measure=False goes by importance alone, and top_k 3 is about"),
        ("params=70%", {"measure": False, "score_samples": 8}, "alone, and score_samples 8 is about measurements"),
        ("params=70%", {"measure": False, "score": Metric("mine", count, True)}, "alone, and score mine is about"),
        ("memory=70%", {"kv_batch": 0, **LEAN}, "kv_batch must be at least 1, not 0"),
        ("memory=70%", {"kv_seq_len": -5, **LEAN}, "kv_seq_len must be at least"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),  # no addresses
)  # fmt: skip
def test_budgets_and_options_that_make_no_sense(thin: Any, budget: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError) as caught:
        minitron(thin, Budget.parse(budget), DATA, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kind_that_the_model_has_not(gpt2: Any) -> None:
    with pytest.raises(SecateurError, match="skip: this model has no kv_groups; it has hidden, ffn, heads, layers"):
        minitron(gpt2, Budget.parse("params=70%"), DATA, skip=("kv_groups",))


def test_dims_and_a_budget_together(thin: Any) -> None:
    for text in ("params=70%", "n:m=2:4"):
        with pytest.raises(SecateurError, match="give either exact dims or a budget, not both"):
            minitron(thin, Budget.parse(text, dims={"ffn": 40}), DATA)


def test_no_hugging_face_model() -> None:
    with pytest.raises(SecateurError, match=r"needs a .*language model.*, not a NoConfig|default inputs"):
        minitron(NoConfig(), Budget.parse("params=70%"), DATA)


def test_layers_that_differ(llama: Any) -> None:
    axis = discover(llama).of_kind("ffn")[0]
    uneven = apply(llama, Plan({axis.name: Kept("ffn", axis.size, tuple(range(50)))}))
    with pytest.raises(SecateurError, match="the layers differ in ffn: minitron needs the same sizes in every layer"):
        minitron(uneven, Budget.parse("params=90%"), DATA)


def test_layers_whose_caches_differ_are_counted_exactly() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("gemma2", dtype=torch.float32, num_hidden_layers=3, layer_types=types)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(-1)  # this layer adds nothing: it will go
        model.model.layers[1].post_feedforward_layernorm.weight.fill_(-1)
    space = discover(model)
    workload = Workload(1, 4096, sliding_window(model.config))
    whole = costs(space, Plan(), workload).memory
    without = costs(space, Plan(dropped=("model.layers.1",)), workload).memory
    others = costs(space, Plan(dropped=("model.layers.0",)), workload).memory
    assert others < (whole * 0.7) < without  # on average, a layer less keeps this limit
    with pytest.raises(SecateurError, match=r"memory=[\d,]+: the smallest reachable is [\d,]+ \(96.8%"):
        minitron(
            model, Budget.parse("memory=70%"), DATA, max_depth_cut=0.4, divisors={"layers": 1}, score_samples=1,
            skip=("hidden", "ffn", "heads", "kv_groups"),
        )  # fmt: skip


def test_activations_that_overflow_name_the_place(thin: Any) -> None:
    broken = copy.deepcopy(thin)
    with torch.no_grad():
        broken.model.layers[0].post_attention_layernorm.weight.fill_(1e38)
    with pytest.raises(SecateurError, match=r"NaN or infinite activations at the .* of model\.layers\.0"):
        exact(broken, ffn=40)
