"""Times of models and of their parts: with a timer that counts multiply-accumulates, predictions are exact."""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from small_nets import Mlp, Mobile, Residual, pictures, shaken
from timers import Counter, clock_of, counted
from tiny import random_plan, tiny, tokens
from torch import nn

from secateur.choose.cost import lengths, polynomials
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.measure.clock import Clock, levels_of
from secateur.measure.latency import LatencyTable, Stopwatch, Timing, in_turns, time_models
from secateur.space import Axis, evaluate

_AXES = ("hidden", "ffn", "heads", "kv_groups", "channels", "experts", "expert_ffn", "ssm_heads", "rank")


class Upsampling(nn.Module):
    """A transposed convolution and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 12, 2, 2)
        self.norm, self.out = nn.GroupNorm(4, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(torch.relu(self.norm(self.up(torch.relu(self.down(x))))))


class Encoder(nn.Module):
    """Two of torch's own encoder layers: attention whose projections no module is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (Mlp, torch.zeros(5, 4)),
    "conv": (Residual, pictures()),
    "grouped": (Mobile, pictures()),
    "transposed": (Upsampling, pictures()),
    "encoder": (Encoder, torch.zeros(3, 7, 24)),
}


@cache
def of_net(name: str) -> Clock:
    build, inputs = NETS[name]
    return clock_of(shaken(build()), inputs)


@cache
def of_llama() -> Clock:
    return clock_of(tiny("llama", dtype=torch.float32), {"input_ids": tokens()})


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.75, 0.6])
def test_products_of_a_cut_network_are_predicted(name: str, share: float) -> None:
    inputs, clock = NETS[name][1], of_net(name)
    model = clock.model
    plan = random_plan(clock.space, _AXES, share=share)
    assert clock.predict(plan) == pytest.approx(counted(apply(model, plan, space=clock.space, inputs=inputs), inputs))
    assert clock.predict(plan) < clock.predict(Plan()) == pytest.approx(clock.dense.median)
    if name != "encoder":  # its products of attention are no work of a leaf
        macs = evaluate(polynomials(clock.space)["macs"], lengths(clock.space, plan))
        assert clock.predict(plan) == pytest.approx(macs * len(inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_products_of_a_cut_language_model_are_predicted(name: str) -> None:
    make, inputs = mixture if name == "mixtral" else tiny, {"input_ids": tokens()}
    clock = of_llama() if name == "llama" else clock_of(make(name, dtype=torch.float32), inputs)
    model = clock.model
    kinds = ("hidden", "ffn", "heads", "kv_groups", "attention", "mlp")
    plan = random_plan(clock.space, kinds, share=0.75)
    assert plan.dropped
    cut = apply(model, plan, space=clock.space)
    assert clock.predict(plan) == pytest.approx(counted(cut, inputs), rel=0.01)
    first = clock.space.layers()[0].name
    gone = Plan(dropped=(first,))
    lost = sum(clock.leaf_seconds(leaf, {}) for leaf in clock.leaves if f"{leaf.block}.".startswith(f"{first}."))
    lost += sum(clock.rest(b.name) for b in clock.space.blocks if f"{b.name}.".startswith(f"{first}."))
    assert clock.predict(gone) == pytest.approx(clock.dense.median - lost)


def test_a_rest_follows_what_its_leaves_give_out() -> None:
    """Attention written out: its products belong to no leaf, and go with the heads."""
    model = tiny("llama", dtype=torch.float32, attn_implementation="eager")
    clock = clock_of(model, {"input_ids": tokens()})
    attention = "model.layers.0.self_attn"
    assert clock.rest(attention) == 2 * 2 * 11 * 11 * 48  # two rows, scores and values
    assert clock.rest("model.layers.0.mlp") == clock.rest(None) == 0
    heads = {f"model.layers.{i}.self_attn.kv_groups": 1 for i in range(2)}
    products = clock.seconds({}) - clock.seconds(heads)
    leaves = sum(clock.leaf_seconds(leaf, {}) - clock.leaf_seconds(leaf, heads) for leaf in clock.leaves)
    assert 0 < products - leaves < 2 * clock.rest(attention)


def test_leaves_say_where_they_are_and_what_they_depend_on() -> None:
    clock = of_llama()
    leaves = {leaf.module: leaf for leaf in clock.leaves}
    layer = "model.layers.1"
    down, norm = leaves[f"{layer}.mlp.down_proj"], leaves[f"{layer}.post_attention_layernorm"]
    assert (down.block, down.axes) == (f"{layer}.mlp", ("hidden", f"{layer}.mlp.ffn"))
    assert (norm.block, norm.axes) == (f"{layer}.mlp", ("hidden",))  # idle once the sub-layer is gone
    assert leaves["lm_head"].block is None
    assert clock.leaf_seconds(down, {f"{layer}.mlp.ffn": 20}) == clock.leaf_seconds(down, {}) / 4
    assert clock.leaf_seconds(down, {"hidden": 12}) == clock.leaf_seconds(down, {}) / 4


def test_what_is_timed_does_not_grow_with_depth() -> None:
    taken = []
    for layers in (2, 5):
        timer = Counter()
        clock = clock_of(
            tiny("llama", dtype=torch.float32, num_hidden_layers=layers), {"input_ids": tokens()}, timer=timer
        )
        taken.append(timer.taken)
        before = len(clock.table.entries)
        clock.predict(random_plan(clock.space, ("ffn",), share=0.75))
        assert len(clock.table.entries) == before + 2  # gate and up are alike; down
    assert taken[0] == taken[1]


def test_a_table_spares_the_timing(tmp_path: Path) -> None:
    model, inputs = shaken(Residual()), pictures()
    clock = clock_of(model, inputs)
    clock.measure(clock.points(2))
    clock.table.save(tmp_path / "table.json")
    timer, known = Counter(), LatencyTable.load(tmp_path / "table.json")
    assert known == clock.table
    again = clock_of(model, inputs, table=known, timer=timer, measure=False)
    sizes = {axis.name: levels_of(axis, 2)[0] for axis in clock.space.axes}
    assert again.seconds(sizes) == clock.seconds(sizes)
    assert (again.dense, again.rest(None)) == (clock.dense, clock.rest(None))
    assert timer.taken == 0
    odd = {axis.name: axis.size - 1 for axis in clock.space.axes}
    with pytest.raises(SecateurError, match=r"lacks conv as Conv2d \| weight=7x3x3x3.* secateur profile"):
        again.seconds(odd)
    assert clock.measure(clock.points(2)) == 0
    with pytest.raises(SecateurError, match="lacks model Residual"):
        clock_of(model, pictures(batch=3), table=known, measure=False)


@pytest.mark.parametrize(
    ("field", "value"), [("device", "Abacus 3"), ("dtype", "float16"), ("threads", 99), ("torch_version", "0.4")]
)
def test_a_table_of_another_device_is_refused(field: str, value: Any) -> None:
    table = LatencyTable.here()
    own = getattr(table, field)
    setattr(table, field, value)
    with pytest.raises(SecateurError) as caught:
        clock_of(shaken(Mlp()), torch.zeros(5, 4), table=table)
    assert repr(own) in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_table_of_another_device_may_be_looked_up() -> None:
    model, inputs = shaken(Mlp()), torch.zeros(5, 4)
    table = clock_of(model, inputs).table
    table.device = "Abacus 3"
    assert clock_of(model, inputs, table=table, measure=False).dense.median == counted(model, inputs)
    table.dtype = "float16"
    with pytest.raises(SecateurError, match="'float16' against 'float32'"):
        clock_of(model, inputs, table=table, measure=False)


def test_tables_are_written_whole_and_not_over_others(tmp_path: Path) -> None:
    table, path = LatencyTable.here(), tmp_path / "new" / "t.json"
    table.entries["a | b"] = 0.25
    table.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]
    with pytest.raises(SecateurError, match=r"exists already.*--overwrite"):
        table.save(path)
    table.entries["c"] = 1.0
    table.save(path, overwrite=True)
    assert LatencyTable.load(path).entries == {"a | b": 0.25, "c": 1.0}
    other = tmp_path / "notes.json"
    other.write_text("{}")
    with pytest.raises(SecateurError, match="is no latency table"):
        table.save(other, overwrite=True)
    assert other.read_text() == "{}"
    with pytest.raises(SecateurError, match="is a folder"):
        table.save(tmp_path, overwrite=True)
    with pytest.raises(SecateurError, match="not a folder"):
        table.save(other / "t.json")


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"kind": "plan"}, {"entries": {"a": -1}}, {"entries": {"a": True}}, {"threads": "1"}, {"dtype": 3}],
    ids=str,
)
def test_a_damaged_table_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    LatencyTable.here().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SecateurError, match="is no latency table of format 1"):
        LatencyTable.load(path)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="no readable latency table"):
        LatencyTable.load(tmp_path / "t.json")


def test_models_are_timed_in_turns_and_stay_as_they_are() -> None:
    order: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.fc = name, nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            order.append(self.name)
            return self.fc(x)

    models = [Named("a"), Named("b")]

    def timer(fn: Callable[[], object]) -> float:
        fn()
        return float(len(order))

    a, b = time_models(models, torch.zeros(1, 2), repeats=4, warmup=1, timer=timer)
    assert "".join(order) == "abab" + "abba" * 2
    assert (a.median, a.repeats, b.median) == (8.5, 4, 8.5)
    assert all(model.training for model in models)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_follow_themselves_equally_often(count: int) -> None:
    order: list[int] = []
    functions = [lambda index=index: order.append(index) for index in range(count)]

    def timer(fn: Callable[[], object]) -> float:
        fn()
        return 1.0

    rounds = 4 * count
    samples = in_turns(functions, timer, repeats=rounds + 1, warmup=0)
    assert [len(own) for own in samples] == [rounds + 1] * count
    in_rounds = [sorted(order[i : i + count]) for i in range(0, len(order), count)]
    assert in_rounds == [list(range(count))] * (rounds + 1)
    twice = [a for a, b in pairwise(order) if a == b]
    times = [twice.count(index) for index in range(count)]
    assert max(times) - min(times) <= 1
    assert sum(times) >= rounds // 2


def test_a_limit_of_time_keeps_three_samples() -> None:
    samples = in_turns([lambda: None], lambda _: 1.0, repeats=50, warmup=0, seconds=1e-9)
    assert samples == [[1.0] * 3]


def test_the_stopwatch_takes_the_mean_of_many_quick_calls() -> None:
    calls = [0]

    def quick() -> None:
        calls[0] += 1

    assert 0 < Stopwatch(torch.device("cpu"))(quick) < 1
    assert calls[0] > 10


def test_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_levels_are_even_and_keep_what_must_stay() -> None:
    assert levels_of(Axis("a", "ffn", 2048, ()), 8) == [256 * i for i in range(1, 9)]
    assert levels_of(Axis("a", "heads", 8, (), groups=4), 8) == [1, 2]
    assert levels_of(Axis("a", "experts", 6, (), minimum=2), 3) == [2, 4, 6]
    assert levels_of(Axis("a", "ffn", 80, ()), 3) == [24, 48, 80]


def test_points_are_capped() -> None:
    clock = of_llama()
    counts: dict[str, int] = {}
    for leaf, _ in clock.points(100):
        counts[leaf.module] = counts.get(leaf.module, 0) + 1
    assert 1 < max(counts.values()) <= 64
    with pytest.raises(SecateurError, match="levels must be at least 1, not 0"):
        clock.points(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_models([], None), "no model to time"),
        (lambda: time_models([nn.Linear(2, 2, device="meta")], torch.zeros(1, 2)), "device 'meta'"),
        (lambda: time_models([nn.Linear(2, 2)], torch.zeros(1, 2), repeats=0), "repeats must be at least 1, not 0"),
        (lambda: time_models([nn.Linear(2, 2)], torch.zeros(1, 2), seconds=0), "seconds must be above 0"),
        (
            lambda: time_models([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")], torch.zeros(1, 2)),
            "device 'meta'",
        ),
        (lambda: time_models([nn.Linear(2, 2)], torch.zeros(1, 3)), "Linear does not run on these inputs"),
        (lambda: Clock(shaken(Mlp()), discover(Mlp(), torch.zeros(5, 4)), pictures()), "Mlp does not run on these"),
        (lambda: Stopwatch(torch.device("cpu"), "sun"), "there is no clock 'sun'"),
        (lambda: Stopwatch(torch.device("cuda"), "process"), "no latency on cuda"),
    ],
)
def test_mistakes_are_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        call()


def test_a_trace_with_other_inputs_is_said() -> None:
    model = shaken(Mobile())
    space = discover(model, pictures())
    with pytest.raises(SecateurError, match="traced="):
        Clock(model, space, pictures(), traced=torch.zeros(2, 9, 6, 6), timer=Counter())


def test_nobody_else_notices() -> None:
    model = Mlp().train()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    clock_of(model, torch.zeros(5, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in model.named_parameters())
