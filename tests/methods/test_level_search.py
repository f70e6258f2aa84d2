"""The methods search and obs: budgets are met, and what they tell is so."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from small_nets import Mlp, Residual, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from transformers import LlamaForCausalLM

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload, costs
from secateur.cut import apply
from secateur.cut.names import new_name, renumbered
from secateur.errors import SecateurError
from secateur.measure.quality import Metric
from secateur.methods.base import Decision
from secateur.methods.obs import obs
from secateur.methods.search import search
from secateur.methods.survey import load_survey
from secateur.methods.surveying import survey
from secateur.space import discover

IDS = list(torch.split(tokens(6, 10), 2))
MEMORY = {"kv_batch": 2, "kv_seq_len": 64}
KEPT: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Space of the shared model is found once, since finding it takes longer than a search."""

    def once(model: nn.Module, inputs: Any = None) -> Any:
        if model is not KEPT.get("llama"):
            return discover(model, inputs)
        if "space" not in KEPT:
            KEPT["space"] = discover(model)
        return KEPT["space"]

    monkeypatch.setattr(sys.modules["secateur.methods.searching"], "discover", once)


def llama() -> Any:
    """Made once: no method may change it."""
    if "llama" not in KEPT:
        KEPT["llama"] = tiny("llama", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4)
    return KEPT["llama"]


def found(budget: str, model: Any = None, data: Any = IDS, **options: Any) -> Decision:
    how = {"levels": 6, "probes": 1, "trials": 8, **MEMORY, **options}
    return search(model or llama(), Budget.parse(budget), data, **how)


def shares(decision: Decision) -> dict[str, float]:
    """What is left of the dense costs, counted for the plan."""
    workload = Workload(MEMORY["kv_batch"], MEMORY["kv_seq_len"])
    dense, after = (costs(decision.space, plan, workload) for plan in (type(decision.plan)(), decision.plan))
    measures = ("params", "active_params", "macs", "memory")
    return {m: after.of(m) / dense.of(m) for m in measures} | {"flops": after.flops / dense.flops}


def sizes(decision: Decision) -> dict[str, int]:
    return {name: len(kept.units) for name, kept in decision.plan.kept.items()}


# Budgets


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "free"])
@pytest.mark.parametrize("budget", ["params=80%", "flops=70%", "memory=75%", "params=80%,memory=82%"])
def test_budgets_are_met_and_used(budget: str, uniform: bool) -> None:
    decision = found(budget, uniform=uniform, trials=0, probes=0)
    left = shares(decision)
    limits = {part.split("=")[0]: float(part.split("=")[1][:-1]) / 100 for part in budget.split(",")}
    assert all(left[m] <= limit * (1 + 1e-12) for m, limit in limits.items())
    # A unit of the MLP in both layers is 0.7% of the model.
    assert any(left[m] >= limit - 0.01 for m, limit in limits.items())
    for m, told in decision.details["target"].items():
        assert told["reached"] / told["limit"] == pytest.approx(left[m] / limits[m])
        assert told["reached"] <= told["limit"] * (1 + 1e-12)


def test_uniform_sizes_have_a_stock_config() -> None:
    decision = found("params=75%")
    pruned: Any = apply(llama(), decision.plan, space=decision.space)
    assert type(pruned) is LlamaForCausalLM
    assert not hasattr(pruned.config, "secateur")
    again = LlamaForCausalLM(pruned.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}
    assert pruned.num_parameters() <= 0.75 * llama().num_parameters()


def test_channels_of_a_network_with_batch_norm() -> None:
    model, data = shaken(Residual()), [(pictures(4, seed=i), torch.zeros(4, dtype=torch.int64)) for i in range(3)]
    decision = found("macs=60%", model, data, inputs=pictures())
    pruned = apply(model, decision.plan, space=decision.space, inputs=pictures())
    assert shares(decision)["macs"] <= 0.6
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_mixture_of_experts() -> None:
    decision = found("params=85%", mixture("mixtral", dtype=torch.float32), drop=False)
    assert {kept.kind for kept in decision.plan.kept.values()} <= {"heads", "kv_groups", "expert_ffn"}
    assert 0.84 <= shares(decision)["params"] <= 0.85
    assert set(decision.details["left"]) == {f"model.layers.{i}.mlp.experts" for i in range(2)}


def test_the_same_seed_decides_the_same() -> None:
    one, other = (found("params=80%", uniform=False, trials=16) for _ in range(2))
    assert one.plan == other.plan
    drop = ("seconds",)
    assert {k: v for k, v in one.details.items() if k not in drop} == {
        k: v for k, v in other.details.items() if k not in drop
    }


def test_refinement_is_no_worse_than_the_program_alone() -> None:
    told = found("params=70%", uniform=False, trials=24).details["levels"]
    assert told["measured"] <= told["before_refinement"]
    assert told["measure"] == "kl"


# Options


def test_only_and_ignore() -> None:
    assert {k.kind for k in found("params=90%", only=("ffn",), drop=False).plan.kept.values()} == {"ffn"}
    decision = found("params=85%", uniform=False, ignore=("model.layers.0*",), drop=False, trials=0, probes=0)
    assert sizes(decision)
    assert all(name.startswith("model.layers.1.") for name in sizes(decision))
    assert "ffn" not in {k.kind for k in found("params=92%", ignore=("ffn",), drop=False).plan.kept.values()}


@pytest.mark.parametrize("uniform", [True, False])
def test_sizes_are_rounded(uniform: bool) -> None:
    decision = found("params=80%", only=("ffn",), round_to={"ffn": 12}, uniform=uniform, drop=False, trials=0)
    assert sizes(decision)
    assert all(n % 12 == 0 for n in sizes(decision).values())


def test_heads_are_rounded_over_all_groups() -> None:
    """24 heads in 4 groups: a step of a single unit in each group may be no multiple of 6."""
    model = tiny("llama", dtype=torch.float32, num_attention_heads=24, num_key_value_heads=4, head_dim=4)
    decision = found("params=88%", model, only=("heads",), round_to=6, drop=False, trials=0, probes=0)
    assert sizes(decision)
    assert all(n % 6 == 0 for n in sizes(decision).values())


def test_without_drop_nothing_is_dropped() -> None:
    assert found("params=60%", drop=False, probes=0, trials=0).plan.dropped == ()
    assert found("params=60%", drop=False, probes=0, trials=0, uniform=False).plan.dropped == ()


def test_obs_is_a_search_that_measures_nothing() -> None:
    one = obs(llama(), Budget.parse("params=80%"), IDS, levels=6, **MEMORY)  # type: ignore[arg-type]
    assert one.plan == found("params=80%", drop=False, probes=0, trials=0).plan
    assert "measured" not in one.details["levels"]


def test_a_score_of_the_users_own_is_what_is_measured() -> None:
    calls: list[int] = []

    def left_of_last(model: Any) -> float:
        calls.append(1)
        return float(model.get_parameter("model.layers.1.mlp.down_proj.weight").any(0).sum())

    metric = Metric("last", left_of_last, higher_is_better=True)
    decision = found("params=85%", uniform=False, drop=False, score=metric, trials=24, probes=2)
    assert calls
    assert decision.details["levels"]["measure"] == "last"
    assert "model.layers.1.mlp.ffn" not in decision.plan.kept  # that would cost score, all else is free


# A survey that was saved


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    if "survey" not in KEPT:
        space = discover(llama())
        KEPT["survey"] = survey(llama(), space, [a for a in space.axes if a.kind != "hidden"], IDS)
    KEPT["survey"].save(tmp_path)
    return tmp_path


def test_a_survey_decides_and_repairs_without_data(saved: Path) -> None:
    decision = found("params=60%", data=(), survey=saved)
    assert shares(decision)["params"] <= 0.6
    own = load_survey(saved, llama(), discover(llama()))
    axes = {n: decision.space.axis(n) for n in decision.plan.kept}
    cut = {n: len(k.units) // axes[n].groups for n, k in decision.plan.kept.items()}
    moved = renumbered(decision.space, decision.plan)
    wanted = {str(new_name(n, moved)): t for n, t in own.repaired(cut, decision.plan).items()}
    assert decision.weights.keys() == wanted.keys()
    assert wanted
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in decision.weights.items())
    pruned = dict(apply(llama(), decision.plan, space=decision.space).named_parameters())
    for name, tensor in decision.weights.items():
        assert pruned[name].shape == tensor.shape
        assert not torch.equal(pruned[name], tensor)


def test_repaired_weights_have_the_names_of_the_layers_that_stay(tmp_path: Path) -> None:
    """The second of three layers does nothing, so it goes; what was the third is the second then."""
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=3)
    with torch.no_grad():
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.1.{leaf}.weight").zero_()
    space = discover(model)
    survey(model, space, space.of_kind("ffn"), IDS).save(tmp_path)
    decision = found("params=65%", model, (), survey=tmp_path, only=("ffn",))
    assert decision.plan.dropped == ("model.layers.1",)
    assert set(decision.weights) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


def test_with_data_the_repair_is_left_to_the_verbs(saved: Path) -> None:
    assert found("params=80%", survey=saved).weights == {}


def test_a_survey_of_another_model(saved: Path) -> None:
    other = tiny("llama", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4, seed=1)
    with pytest.raises(SecateurError, match="was made of another model"):
        found("params=80%", other, survey=saved)


# Refusals

MLP = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
PAIRS = [(MLP, torch.zeros(20, dtype=torch.int64))]


def on_mlp(budget: str, data: Any = PAIRS, **options: Any) -> Decision:
    return search(shaken(Mlp()), Budget.parse(budget), data, inputs=MLP[:2], levels=4, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number(value: float) -> None:
    metric = Metric("odd", lambda _: value, higher_is_better=True)
    with pytest.raises(SecateurError, match="the score of a cut model is"):
        on_mlp("params=70%", score=metric)


def test_budgets_that_make_no_sense() -> None:
    with pytest.raises(SecateurError, match="keeps the budget params=100% already"):
        on_mlp("params=100%")
    with pytest.raises(SecateurError, match=r"the budget cannot be met \(params=\d+: the smallest reachable is (\d+)"):
        on_mlp("params=5%")
    with pytest.raises(SecateurError, match="a budget of sparsity is not served"):
        on_mlp("sparsity=50%")
    with pytest.raises(SecateurError, match="a budget of n:m is not served"):
        on_mlp("n:m=2:4")
    with pytest.raises(SecateurError, match="no budget is given"):
        on_mlp("")
    with pytest.raises(SecateurError, match="takes a budget, such as params=70%, and no exact dims"):
        search(shaken(Mlp()), Budget.parse(dims={"ffn": 3}), PAIRS, inputs=MLP)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_smallest_that_is_told_can_be_reached(uniform: bool) -> None:
    with pytest.raises(SecateurError, match="the smallest reachable") as error:
        found("params=1%", uniform=uniform, probes=0, trials=0)
    floor = int(str(error.value).split("smallest reachable is ")[1].split(" ")[0].replace(",", ""))
    decision = found(f"params={floor}", uniform=uniform, probes=0, trials=0)
    pruned = apply(llama(), decision.plan, space=decision.space)
    assert sum(p.numel() for p in pruned.parameters()) <= floor
    with pytest.raises(SecateurError, match="the smallest reachable"):
        found(f"params={floor - 1}", uniform=uniform, probes=0, trials=0)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(SecateurError, match="search needs data, or a survey"):
        on_mlp("params=70%", data=())
    for option, value in (("probes", -1), ("trials", -1), ("score_samples", 0)):
        with pytest.raises(SecateurError, match=f"{option} must be at least {value + 1}, not {value}"):
            on_mlp("params=70%", **{option: value})
    with pytest.raises(SecateurError, match="levels must be at least 2, not 1"):
        search(shaken(Mlp()), Budget.parse("params=70%"), PAIRS, inputs=MLP, levels=1)
    with pytest.raises(SecateurError, match="no readable survey in"):
        on_mlp("params=70%", survey=Path("nowhere"))


def test_obs_keeps_no_moments_and_says_whether_gradients_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    searching = sys.modules["secateur.methods.searching"]
    made: list[Any] = []

    def kept(*args: Any, **named: Any) -> Any:
        made.append(survey(*args, **named))
        return made[-1]

    monkeypatch.setattr(searching, "make_survey", kept)
    told = [
        obs(llama(), Budget.parse("params=80%"), IDS, levels=6, gradients=gradients, **MEMORY).details  # type: ignore[arg-type]
        for gradients in (True, False)
    ]
    found("params=80%", drop=False, probes=0)
    found("params=80%", drop=True, probes=0, trials=0)
    assert [x["calibration"]["gradients"] for x in told] == [True, False]
    assert [(one.moments, one.gradients) for one in made] == [(False, True), (False, False), (True, True), (True, True)]


def test_gradients_are_settled_when_a_survey_is_made(saved: Path) -> None:
    with pytest.raises(SecateurError, match="gradients are taken or not when a survey is made"):
        obs(llama(), Budget.parse("params=80%"), survey=saved, gradients=False)
