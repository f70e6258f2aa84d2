"""The repair of cut models: exact where nothing need be lost, better on the calibration data wherever it is applied."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from mixtures import mixture
from small_nets import Mlp, Mobile, Residual, pictures, shaken
from tiny import random_plan, tiny, tokens
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel

import secateur
from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.load.batches import run
from secateur.methods import repair as module
from secateur.methods.repair import repair

IDS = [tokens(3, 14, seed=seed) for seed in range(5)]
PICTURES = [pictures(6, 8, seed=seed, dtype=torch.float64) for seed in range(4)]
ROWS = [torch.randn(30, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]


class Vgg(nn.Sequential):
    """Convolutions without bias, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 20, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)),
        )


class Upsampling(nn.Module):
    """Transposed convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 12, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(12, 16, 3, groups=4, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(functional.relu(self.grouped(functional.relu(self.up(x)))))


class Attending(nn.Module):
    """torch's own attention: packed projections, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.out = nn.Linear(4, 24), nn.Linear(24, 5)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.rise(x)
        return self.out(self.layer(x + self.attention(x, x, x, need_weights=False)[0]))


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )
    return shaken(BertModel(config, add_pooling_layer=False), dtype=torch.float64)


def shake(net: Callable[[], nn.Module]) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(1)  # what is asked of a repair may not depend on the tests before
        return shaken(net(), dtype=torch.float64)

    return made


def result(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        out = run(model, batch)
    found: torch.Tensor = getattr(out, "logits", getattr(out, "last_hidden_state", out))
    return found.double()


def error(pruned: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
    """Mean squared error to the dense model, as a share of its mean square."""
    apart = sum(float((result(pruned, b) - result(dense, b)).square().sum()) for b in batches)
    return apart / sum(float(result(dense, b).square().sum()) for b in batches)


def repaired(
    dense: Any, batches: Sequence[Any], kinds: Sequence[str], *, plan: Plan | None = None, **options: Any
) -> tuple[Any, dict[str, Any], float, float]:
    """The repaired model, what was told, and the error without and with the repair."""
    inputs = None if hasattr(dense, "config") else batches[0][:2]
    space = discover(dense, inputs)
    plan = plan or random_plan(space, kinds, share=0.6)
    pruned = apply(dense, plan, space=space, inputs=inputs)
    before = error(pruned, dense, batches)
    told = repair(dense, pruned, plan, space, batches, **options)
    return pruned, told, before, error(pruned, dense, batches)


CASES: dict[str, tuple[Callable[[], Any], Sequence[Any], tuple[str, ...], float]] = {
    "mlp": (shake(Mlp), ROWS, ("ffn",), 0.2),
    "vgg": (shake(Vgg), PICTURES, ("channels",), 0.1),
    "resnet": (shake(Residual), PICTURES, ("channels",), 0.1),
    "depthwise and grouped": (shake(Mobile), PICTURES, ("channels",), 0.2),
    "transposed": (shake(Upsampling), PICTURES, ("channels",), 0.6),
    "torch attention": (shake(Attending), [x[:, None].reshape(6, 5, 4) for x in ROWS], ("heads",), 0.8),
    "gpt2": (lambda: tiny("gpt2"), IDS, ("ffn", "heads"), 0.3),
    "gptj, in parallel": (lambda: tiny("gptj"), IDS, ("ffn",), 0.4),
    "gemma2, norms behind": (lambda: tiny("gemma2"), IDS, ("ffn",), 0.9),
    "bert": (bert, IDS, ("ffn", "heads"), 0.1),
    "mixtral": (lambda: mixture("mixtral", dtype=torch.float32), IDS, ("expert_ffn",), 0.8),
    "mixtral without experts": (lambda: mixture("mixtral", dtype=torch.float32), IDS, ("experts",), 0.95),
    "gpt_oss": (lambda: mixture("gpt_oss", dtype=torch.float32), IDS, ("expert_ffn",), 0.5),
    "mamba2": (lambda: mixture("mamba2", dtype=torch.float32), IDS, ("ssm_heads",), 0.95),
    "llama, hidden": (lambda: tiny("llama"), IDS, ("hidden",), 0.5),
    "llama, layer": (lambda: tiny("llama", num_hidden_layers=3), IDS, ("layers",), 0.3),
    "llama, attention": (lambda: tiny("llama", num_hidden_layers=3), IDS, ("attention",), 0.3),
}
"""Model, data, what is cut, and the largest share of the error that may be left."""


@pytest.mark.parametrize("case", CASES)
def test_the_repair_comes_closer_to_the_dense_model(case: str) -> None:
    make, batches, kinds, most = CASES[case]
    dense = make()
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    pruned, told, before, after = repaired(dense, batches, kinds)
    assert after < most * before, (before, after)
    assert told["weights"]
    assert all(w["after"] <= w["before"] + 1e-9 for w in told["weights"].values())
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*dense.modules(), *pruned.modules()])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("case", ["mlp", "vgg", "resnet", "depthwise and grouped", "gpt2", "bert", "gpt_oss"])
def test_the_bias_alone_helps_too(case: str) -> None:
    make, batches, kinds, _ = CASES[case]
    dense = make()
    pruned, told, before, after = repaired(dense, batches, kinds, mend="bias")
    assert after < 0.95 * before
    assert told["weights"]
    assert "no_bias" not in told
    plain = repaired(dense, batches, kinds, mend="none")[0]
    changed = [n for n, v in pruned.state_dict().items() if not torch.equal(v, plain.state_dict()[n])]
    assert changed
    assert all(name.endswith(("bias", "running_mean")) for name in changed)


def test_the_bias_of_a_layer_is_the_mean_of_what_it_lost() -> None:
    dense = shaken(Mlp(), dtype=torch.float64)
    space = discover(dense, ROWS[0][:2])
    axis = next(a for a in space.axes if any(p.parameter == "mid.weight" and p.dim == 1 for p in a.slices))
    plan = Plan({axis.name: Kept(axis.kind, axis.size, (0, 1, 2, 4, 7))})
    pruned = repaired(dense, ROWS, (), plan=plan, mend="bias")[0]
    gone = [3, 5, 6, 8, 9]
    mean = torch.tanh(dense.up(torch.cat(ROWS))).mean(0)
    torch.testing.assert_close(pruned.mid.bias, dense.mid.bias + dense.mid.weight[:, gone] @ mean[gone])
    assert torch.equal(pruned.mid.weight, dense.mid.weight[:, [0, 1, 2, 4, 7]])


def test_without_a_bias_there_is_no_place_for_the_mean() -> None:
    pruned, told, before, after = repaired(tiny("llama"), IDS, ("ffn",), mend="bias")
    del pruned
    assert told["no_bias"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert before == after


def test_units_that_are_twins_are_not_missed() -> None:
    dense = tiny("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[40:] = weight[:40]
            layer.mlp.up_proj.weight[40:] *= torch.linspace(-2, 3, 40)[:, None].double()
    space = discover(dense)
    plan = Plan({a.name: Kept("ffn", 80, tuple(range(40))) for a in space.of_kind("ffn")})
    _, told, before, after = repaired(dense, IDS, (), plan=plan, damping=1e-12)
    assert before > 0.01
    assert after < 1e-12
    assert {w["by"] for w in told["weights"].values()} == {"residual"}


def test_the_target_is_what_the_residual_stream_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the first layer alone: only what is fitted to the sum can make up for it in the later ones."""
    dense = tiny("llama", num_hidden_layers=4)
    space = discover(dense)
    axes = space.of_kind("ffn")[:3]
    plan = Plan({a.name: Kept("ffn", 80, tuple(range(0, 80, 3))) for a in axes})
    _, told, _, with_it = repaired(dense, IDS, (), plan=plan)
    assert {w["by"] for w in told["weights"].values()} == {"residual"}
    assert "model.layers.3.self_attn.o_proj.weight" in told["weights"]
    whole = module._Repair._member

    def plain(*args: Any) -> Any:
        found = whole(*args)
        if found is not None:
            found.sums = 0
        return found if found is None or found.pair.lossy else None

    monkeypatch.setattr(module._Repair, "_member", plain)
    _, told, _, without = repaired(dense, IDS, (), plan=plan)
    assert {w["by"] for w in told["weights"].values()} == {"rows"}
    assert with_it < 0.9 * without


def test_a_residual_fit_is_the_least_squares_solution() -> None:
    """The last block alone is cut, so both models give it the same: the oracle is one call of lstsq."""
    dense = tiny("gpt2", n_layer=1)
    space = discover(dense)
    keep = tuple(range(0, 80, 5))
    plan = Plan({a.name: Kept("ffn", 80, keep) for a in space.of_kind("ffn")})
    pruned = repaired(dense, IDS, (), plan=plan, damping=0.0)[0]
    seen: list[torch.Tensor] = []
    hook = dense.transformer.h[0].mlp.c_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    for batch in IDS:
        result(dense, batch)
    hook.remove()
    x = torch.cat(seen)
    own, other = dense.transformer.h[0].mlp.c_proj, pruned.transformer.h[0].mlp.c_proj
    wide = torch.cat([x[:, list(keep)], torch.ones(len(x), 1, dtype=x.dtype)], 1)
    expected = torch.linalg.lstsq(wide, x @ own.weight + own.bias).solution
    torch.testing.assert_close(other.weight.detach(), expected[:-1].detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other.bias.detach(), expected[-1].detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mend", ["least_squares", "bias"])
def test_batch_norms_take_the_intercept(mend: str) -> None:
    """What comes out of the norm of a repaired convolution has the mean that it has in the dense model."""
    dense = shaken(Vgg(), dtype=torch.float64)
    space = discover(dense, PICTURES[0][:2])
    plan = random_plan(space, ("channels",))
    kept = next(
        list(plan.kept[a.name].units)
        for a in space.axes
        if any((p.parameter, p.dim) == ("3.weight", 0) for p in a.slices)
    )
    pruned, told, _, _ = repaired(dense, PICTURES, (), plan=plan, mend=mend)
    assert told["batch_norms_refolded"] == ["3.weight", "6.weight"]
    x = torch.cat(PICTURES)
    own, other = (nn.Sequential(*list(net)[:5])(x).mean((0, 2, 3)) for net in (pruned, dense))
    torch.testing.assert_close(own, other[kept], rtol=1e-6, atol=1e-6)


def test_experts_are_fitted_on_their_own_rows() -> None:
    _, told, _, _ = repaired(mixture("mixtral", dtype=torch.float32), IDS, ("expert_ffn",))
    by = {name: w["by"] for name, w in told["weights"].items()}
    assert {by[f"model.layers.{i}.mlp.experts.down_proj"] for i in range(2)} == {"dense"}
    assert by["model.layers.1.self_attn.o_proj.weight"] == "residual"


def test_tied_weights_stay_tied_and_untouched() -> None:
    dense = tiny("llama", tie_word_embeddings=True)
    pruned, told, before, after = repaired(dense, IDS, ("hidden",))
    plain = repaired(dense, IDS, ("hidden",), mend="none")[0]
    assert told["left"] == {"model.embed_tokens.weight": "tied"}
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert torch.equal(pruned.lm_head.weight, plain.lm_head.weight)
    assert after < before


def test_it_is_the_same_again() -> None:
    one, two = (repaired(tiny("llama"), IDS, ("ffn",))[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    pruned, told, before, after = repaired(tiny("llama", dtype=dtype), IDS, ("ffn",))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert after < 0.6 * before
    assert {w["by"] for w in told["weights"].values()} == {"residual"}


def test_fewer_tokens_than_columns_are_told() -> None:
    _, told, before, after = repaired(tiny("llama"), [tokens(1, 9)], ("ffn",))
    assert told["few_rows"]["model.layers.0.mlp.down_proj.weight"] == [9, 48]
    assert after < before


def test_what_is_wrong_is_named() -> None:
    dense = tiny("llama")
    space = discover(dense)
    plan = random_plan(space, ("ffn",))
    with pytest.raises(SecateurError, match="no repair 'least_square'; did you mean 'least_squares'"):
        repair(dense, dense, plan, space, IDS, mend="least_square")
    with pytest.raises(SecateurError, match="mend bias needs calibration data"):
        repair(dense, dense, plan, space, [], mend="bias")
    with pytest.raises(SecateurError, match="damping must be at least 0, not -1"):
        repair(dense, dense, plan, space, IDS, damping=-1)
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    for mend in ("least_squares", "bias"):
        pruned: Any = apply(dense, plan, space=space)
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.nan_to_num_()
        if mend == "bias":
            for layer in pruned.model.layers:
                layer.mlp.down_proj.register_parameter("bias", nn.Parameter(torch.zeros(48, dtype=torch.float64)))
        with pytest.raises(SecateurError, match=r"activations at the input of model\.layers\.1\.mlp\.down"):
            repair(dense, pruned, plan, space, IDS, mend=mend)
        gc.collect()  # what an error keeps alive must not undo anything later
        assert torch.is_grad_enabled()
        assert torch.backends.mha.get_fastpath_enabled()


def test_prune_repairs_where_there_is_data() -> None:
    dense = tiny("llama", dtype=torch.float32)
    options: dict[str, Any] = {"data": torch.cat(IDS), "batch_size": 5}
    plain = secateur.prune(dense, {"intermediate_size": 40}, mend="none", **options)
    mended = secateur.prune(dense, {"intermediate_size": 40}, **options)
    assert plain.report["mend"] == {"method": "none"}
    assert mended.report["mend"]["method"] == "least_squares"
    assert mended.report["mend"]["samples"] == 15
    assert mended.plan.kept == plain.plan.kept
    assert error(mended.model, dense, IDS) < 0.8 * error(plain.model, dense, IDS)
    replayed = apply(dense, mended.plan)  # a plan says what goes; what repair made of the rest is in the weights alone
    assert all(torch.equal(v, replayed.state_dict()[n]) for n, v in plain.model.state_dict().items())


def test_prune_without_data_repairs_nothing() -> None:
    dense = shaken(Mlp())
    x = torch.randn(40, 4)
    options: dict[str, Any] = {"method": "structural", "inputs": x[:2]}
    assert secateur.prune(dense, "params=70%", **options).report["mend"] == {"method": "none"}
    with pytest.raises(SecateurError, match="mend bias needs calibration data"):
        secateur.prune(dense, "params=70%", mend="bias", **options)
    assert secateur.prune(dense, "params=70%", data=[x], **options).report["mend"]["method"] == "least_squares"
    with pytest.raises(SecateurError, match="repairs structural cuts, and wanda makes masks"):
        secateur.prune(dense, "sparsity=50%", method="wanda", data=[x], mend="bias")
    assert "mend" not in secateur.prune(dense, "sparsity=50%", method="wanda", data=[x]).report


def test_data_is_read_once() -> None:
    dense = shaken(Vgg())
    times = []

    def given() -> Any:
        times.append(1)
        yield from (x.float() for x in PICTURES)

    found = secateur.prune(
        dense, "params=70%", method="structural", data=given(), inputs=PICTURES[0][:2].float(), adapt_batch_norm=True
    )
    assert len(times) == 1
    assert found.report["batch_norms_adapted"] == 3
    assert found.report["mend"]["weights"]


class Scaled(nn.Module):
    """Residual blocks with a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(4, 20) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, 4) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 0.1])) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down, scale in zip(self.ups, self.downs, self.scales, strict=True):
            x = x + scale * down(torch.tanh(up(x)))
        return x


def test_factors_on_the_way_to_the_sum_count() -> None:
    """The last weight is the least squares solution of what the sum lacks, by its factors."""
    torch.manual_seed(0)
    dense = Scaled().double().eval()
    space = discover(dense, ROWS[0][:2])
    plan = Plan({a.name: Kept(a.kind, 20, tuple(range(0, 20, 2))) for a in space.axes if a.size == 20})
    pruned, told, _, _ = repaired(dense, ROWS, (), plan=plan, damping=0.0)
    assert {w["by"] for w in told["weights"].values()} == {"residual"}
    x = torch.cat(ROWS)
    with torch.no_grad():
        stream = x + pruned.scales[0] * pruned.downs[0](torch.tanh(pruned.ups[0](x)))
        read = torch.tanh(pruned.ups[1](stream))
        wanted = (dense(x) - stream) / dense.scales[1]
        expected = torch.linalg.lstsq(torch.cat([read, torch.ones(len(x), 1, dtype=x.dtype)], 1), wanted).solution
    torch.testing.assert_close(pruned.downs[1].weight.detach(), expected[:-1].T, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pruned.downs[1].bias.detach(), expected[-1], rtol=1e-5, atol=1e-7)


def test_what_is_read_together_is_fitted_each_to_its_own() -> None:
    dense = tiny("llama")
    pruned = repaired(dense, IDS, ("hidden",), damping=0.0)[0]
    inputs: list[list[torch.Tensor]] = []
    for model in (dense, pruned):
        seen: list[torch.Tensor] = []
        q_proj = model.model.layers[0].self_attn.q_proj
        hook = q_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        for batch in IDS:
            result(model, batch)
        hook.remove()
        inputs.append(seen)
    x, x_cut = (torch.cat(seen) for seen in inputs)
    for name in ("q_proj", "k_proj", "v_proj"):
        one, two = (m.model.layers[0].self_attn.get_submodule(name).weight.detach() for m in (dense, pruned))
        torch.testing.assert_close(two.T, torch.linalg.lstsq(x_cut, x @ one.T).solution, rtol=1e-5, atol=1e-7)
