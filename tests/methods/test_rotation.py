"""The residual stream in another basis: the same function at full width, and more of it left when it is cut."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import mixture
from tiny import logits, tiny, tokens
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.methods.repair import repair
from secateur.methods.rotation import (
    after_cut,
    after_repair,
    basis,
    expected_loss,
    first_units,
    measure_streams,
    rotated,
)
from secateur.score.activation import activation_scores

IDS = [tokens(3, 14, seed=seed) for seed in range(5)]
BUNDLED = Path(__file__).parents[2] / "examples" / "models" / "pydoc-llama"
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama", **UNTIED),
    "llama with biases": lambda: tiny("llama", attention_bias=True, mlp_bias=True, **UNTIED),
    "mistral": lambda: tiny("mistral", **UNTIED),
    "qwen2": lambda: tiny("qwen2", **UNTIED),
    "qwen3": lambda: tiny("qwen3", **UNTIED),
    "gemma": lambda: tiny("gemma", head_dim=20, **UNTIED),
    "mixtral": lambda: mixture("mixtral", dtype=torch.float32, **UNTIED),
    "qwen2_moe": lambda: mixture("qwen2_moe", dtype=torch.float32, **UNTIED),
    "tied llama": lambda: tiny("llama", tie_word_embeddings=True),
    "tied qwen2": lambda: tiny("qwen2", tie_word_embeddings=True),
    "tied gemma": lambda: tiny("gemma", head_dim=20, tie_word_embeddings=True),
}


def seen(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What linear layers and activations inside the blocks give, and what goes into each norm of the stream."""
    inside: dict[str, torch.Tensor] = {}
    stream: dict[str, torch.Tensor] = {}
    handles = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in ("o_proj", "down_proj", "lm_head"):
            handles.append(part.register_forward_hook(lambda _, __, y, name=name: inside.update({name: y})))
        if name.rpartition(".")[2] in ("input_layernorm", "post_attention_layernorm", "norm"):
            handles.append(part.register_forward_pre_hook(lambda _, x, name=name: stream.update({name: x[0]})))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return inside, stream


def in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that do not go down to float32, which would be all that is left of float64."""
    for kind in {type(part) for part in model.modules() if type(part).__name__.endswith("RMSNorm")}:
        offset = 1.0 if kind.__name__.startswith("Gemma") else 0.0

        def forward(self: Any, x: torch.Tensor, offset: float = offset) -> torch.Tensor:
            eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
            result: torch.Tensor = (self.weight + offset) * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())
            return result

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_in_another_basis(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    in_float64(model, monkeypatch)
    space = discover(model)
    most = 1e-9
    if name in ("mixtral", "qwen2_moe"):  # torch has no grouped product in float64; routers work in float32
        model.double().set_experts_implementation("eager")
        most = 1e-6
    streams = measure_streams(model, space, IDS)
    assert len(streams.streams) == 2 * model.config.num_hidden_layers + 1
    assert (streams.tied is not None) == name.startswith("tied")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base: Any = rotated(model, space, streams, 30)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    Q = basis(streams, 30).matrix
    assert torch.allclose(Q.T @ Q, torch.eye(48).double())
    inside, stream = seen(model, IDS[0])
    now_inside, now_stream = seen(base, IDS[0])
    assert len(inside) >= 3 * model.config.num_hidden_layers
    assert len(stream) == len(streams.streams)
    for key, value in inside.items():
        assert float((now_inside[key] - value).abs().max()) < most, key
    for key, value in stream.items():
        assert float((now_stream[key] - value @ Q).abs().max()) < most, key
    parameters = dict(base.named_parameters())
    for norm in space.norms:
        if norm.axis == "hidden" and norm.module != streams.tied:
            assert bool((parameters[norm.weight or ""] + norm.weight_offset == 1).all())
    if streams.tied is None:
        assert float((logits(base, IDS[0]) - logits(model, IDS[0])).abs().max()) < most
    else:
        assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
        apart = (logits(base, IDS[0]) - logits(model, IDS[0])).norm() / logits(model, IDS[0]).norm()
        assert 1e-9 < float(apart) < 0.3


def test_a_tied_head_is_exact_where_the_whole_stream_stays() -> None:
    model = MODELS["tied llama"]()
    space = discover(model)
    base: Any = rotated(model, space, measure_streams(model, space, IDS), 48)
    assert float((logits(base, IDS[0]) - logits(model, IDS[0])).abs().max()) < 1e-3


def test_the_readers_of_each_norm() -> None:
    model = MODELS["qwen2_moe"]()
    streams = measure_streams(model, discover(model), IDS)
    own = {stream.norm: {name.rpartition("mlp.")[2] for name in stream.readers} for stream in streams.streams}
    assert own["model.norm"] == {"lm_head.weight"}
    assert own["model.layers.1.post_attention_layernorm"] == {
        *("gate.weight", "experts.gate_up_proj", "shared_expert_gate.weight"),
        *("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"),
    }


def test_expected_loss_falls_to_nothing_and_all_is_the_same_again() -> None:
    model = MODELS["tied llama"]()
    space = discover(model)
    streams, again = (measure_streams(model, space, IDS) for _ in range(2))
    losses = [expected_loss(streams, k) for k in (12, 24, 36, 44, 48)]
    assert all(a > b for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1e-6 * losses[0]
    one, two = rotated(model, space, streams, 24), rotated(model, space, again, 24)
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))
    assert expected_loss(again, 24) == losses[1]


def kl(model: Any, dense: Any, ids: torch.Tensor) -> float:
    one, two = (functional.log_softmax(logits(m, ids).double(), -1) for m in (dense, model))
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama with biases", "gemma", "mixtral", "tied gemma", "tied qwen2"])
def test_each_step_after_the_cut_helps(name: str) -> None:
    model = MODELS[name]()
    space = discover(model)
    streams = measure_streams(model, space, IDS)
    base, found = rotated(model, space, streams, 40), basis(streams, 40)
    plan = Plan(first_units(space, 40))
    pruned: Any = apply(base, plan, space=space)
    unscaled = kl(pruned, model, IDS[0])
    after_cut(base, pruned, space, plan, streams, found)
    scaled = kl(pruned, model, IDS[0])
    repair(base, pruned, plan, space, IDS)
    repaired = kl(pruned, model, IDS[0])
    told = after_repair(base, pruned, space, plan, found, IDS)
    last = kl(pruned, model, IDS[0])
    assert repaired < scaled < unscaled
    if found.tie is None:
        assert told == {}
        assert last == repaired
    else:
        assert told["final_norm"] == "model.norm"
        assert told["after"] < told["before"]
        assert last < scaled


def test_the_scale_of_a_tied_gemma_goes_where_the_cut_put_it() -> None:
    """The stock config of a narrower Gemma scales embeddings by less: its table is larger, its last norm smaller."""
    model = MODELS["tied gemma"]()
    space = discover(model)
    streams = measure_streams(model, space, IDS)
    base, found = rotated(model, space, streams, 40), basis(streams, 40)
    plan = Plan(first_units(space, 40))
    pruned: Any = apply(base, plan, space=space)
    assert pruned.config.hidden_size == 40
    after_cut(base, pruned, space, plan, streams, found)
    assert found.tie is not None
    head = pruned.lm_head.weight * (1 + pruned.model.norm.weight)
    wanted = model.lm_head.weight @ found.matrix[:, :40] * (found.tie.narrow * found.scales["model.norm"])
    assert torch.allclose(head, wanted)


def test_a_cut_of_heads_and_layers_goes_along() -> None:
    model = MODELS["tied llama"]()
    space = discover(model)
    streams = measure_streams(model, space, IDS)
    base, found = rotated(model, space, streams, 40), basis(streams, 40)
    ffn = {a.name: Kept(a.kind, a.size, tuple(range(60))) for a in space.of_kind("ffn")}
    plan = Plan(first_units(space, 40) | ffn, ("model.layers.0",))
    pruned: Any = apply(base, plan, space=space)
    after_cut(base, pruned, space, plan, streams, found)
    scale = found.scales["model.layers.1.input_layernorm"]
    assert torch.allclose(pruned.model.layers[0].input_layernorm.weight, torch.tensor(scale).double())
    repair(base, pruned, plan, space, IDS)
    told = after_repair(base, pruned, space, plan, found, IDS)
    assert told["after"] < told["before"]


def test_in_a_short_type_the_same_to_its_rounding() -> None:
    model = tiny("llama", dtype=torch.bfloat16, **UNTIED)
    space = discover(model)
    base: Any = rotated(model, space, measure_streams(model, space, IDS), 40)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    wanted = logits(model, IDS[0]).float()
    assert float((logits(base, IDS[0]).float() - wanted).norm() / wanted.norm()) < 0.05


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: tiny("gpt2"), "no RMS norm"),
    "gemma2": (lambda: tiny("gemma2"), "post_attention_layernorm is added to something"),
    "gemma3_text": (lambda: tiny("gemma3_text"), "post_attention_layernorm is added to something"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_turned_is_refused(name: str) -> None:
    make, why = REFUSED[name]
    model = make()
    with pytest.raises(SecateurError, match=why):
        measure_streams(model, discover(model), IDS)


class Layer(nn.Module):
    """One sub-layer of a stream of width 12; `fault` is what reads it besides."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.norm, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 12))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = h if self.fault == "no norm" else self.norm(h)
        if self.fault == "relu":
            x = functional.relu(x)
        if self.fault == "twice":
            x = x + self.norm(2 * h)
        y: torch.Tensor = self.down(functional.gelu(self.up(x)))
        if self.fault == "gain":
            y = self.gain * y
        return h + (functional.tanh(h) if self.fault == "tanh" else 0) + y


class Net(nn.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.last = nn.Embedding(50, 12), nn.Linear(12, 50, bias=False), nn.RMSNorm(12)
        self.layers = nn.ModuleList([Layer(fault), Layer(fault)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        for layer in self.layers:
            h = layer(h)
        result: torch.Tensor = self.head(self.last(h))
        return result


FAULTS = {
    "no norm": "up.weight reads it without a norm",
    "relu": "the result of layers.0.norm goes into relu",
    "gain": "gain multiplies its units one by one",
    "tanh": "something else reads the stream",
    "twice": "the result of layers.0.norm is added to",
}


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_whatever_else_reads_the_stream_is_found(fault: str) -> None:
    net = Net(fault).double()
    ids = torch.randint(0, 50, (8, 11), generator=torch.Generator().manual_seed(1))
    data = [(ids, ids)]
    space = discover(net, (ids,))
    if not fault:
        base: Any = rotated(net, space, measure_streams(net, space, data), 8)
        assert torch.allclose(base(ids), net(ids))
        return
    with pytest.raises(SecateurError, match=FAULTS[fault]):
        rotated(net, space, measure_streams(net, space, data), 8)


def test_bad_arguments_are_named() -> None:
    model = MODELS["tied llama"]()
    space = discover(model)
    with pytest.raises(SecateurError, match="give calibration data"):
        measure_streams(model, space, [])
    with pytest.raises(SecateurError, match="fisher_samples must be at least 1, not 0"):
        measure_streams(model, space, IDS, fisher_samples=0)
    streams = measure_streams(model, space, IDS[:1])
    for k in (0, 49):
        with pytest.raises(SecateurError, match=f"{k} of them cannot stay"):
            rotated(model, space, streams, k)
    base: Any = rotated(model, space, streams, 40)
    plan = Plan({"hidden": Kept("hidden", 48, tuple(range(1, 41)))})
    pruned = apply(base, plan, space=space)
    with pytest.raises(SecateurError, match="the basis is for the first 40"):
        after_cut(base, pruned, space, plan, streams, basis(streams, 40))


def test_more_is_left_of_the_bundled_model_than_by_coordinates() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    rows = torch.from_numpy(np.load(BUNDLED / "calib_ids.npy").astype(np.int64)).reshape(-1, 256)
    data: list[torch.Tensor] = [rows[i : i + 8, :96] for i in range(0, 32, 8)]
    test = rows[100:104]
    space = discover(model)
    streams = measure_streams(model, space, data, fisher_samples=16)
    base, found = rotated(model, space, streams, 144), basis(streams, 144)
    plan = Plan(first_units(space, 144))
    pruned: Any = apply(base, plan, space=space)
    after_cut(base, pruned, space, plan, streams, found)
    repair(base, pruned, plan, space, data)
    after_repair(base, pruned, space, plan, found, data)
    scores = activation_scores(model, space, data, axes=list(space.of_kind("hidden")), layers=False)
    best = sorted(scores.axes["hidden"].topk(144).indices.tolist())
    other_plan = Plan({"hidden": Kept("hidden", 192, tuple(best))})
    other: Any = apply(model, other_plan, space=space)
    repair(model, other, other_plan, space, data)
    assert kl(pruned, model, test) < 0.8 * kl(other, model, test)
