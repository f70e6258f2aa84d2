"""Activation scores against explicit loops in float64 over what plain hooks capture."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.score import Scores, activation_scores
from secateur.space import Space, discover

# (norms of the whole model with the last left out, what reads the heads, what reads the ffn), by layer.
NORMS = {
    "llama": ["model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"],
    "gpt2": ["transformer.h.{}.ln_1", "transformer.h.{}.ln_2"],
    "gptj": ["transformer.h.{}.ln_1"],
    "gemma2": [
        f"model.layers.{{}}.{norm}"
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    ],
}
NORMS["qwen3"] = NORMS["llama"]
READERS = {
    **dict.fromkeys(
        ("llama", "qwen3", "gemma2"), ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")
    ),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gptj": ("transformer.h.{}.attn.out_proj", "transformer.h.{}.mlp.fc_out"),
}
NAMES = {
    **dict.fromkeys(("llama", "qwen3", "gemma2"), ("model.layers.{}.self_attn.", "model.layers.{}.mlp.ffn")),
    "gpt2": ("transformer.h.{}.attn.", "transformer.h.{}.mlp.ffn"),
    "gptj": ("transformer.h.{}.attn.", "transformer.h.{}.mlp.ffn"),
}
LAYERS = {
    **dict.fromkeys(("llama", "qwen3", "gemma2"), "model.layers.{}"),
    **dict.fromkeys(("gpt2", "gptj"), "transformer.h.{}"),
}
HEAD_DIMS = {"llama": 12, "qwen3": 20, "gemma2": 20, "gpt2": 12, "gptj": 12}


@cache
def dense(name: str) -> tuple[Any, Space]:
    model = tiny(name, dtype=torch.float32)
    return model, discover(model)


def capture(model: Any, modules: list[str], ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(first input, output) of modules for one sample at a time, float64 [samples, positions, units]."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}
    handles = []
    for name in modules:

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, key: str = name) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            found[key].append((before.double(), after.double()))

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {k: (torch.cat([b for b, _ in v]), torch.cat([a for _, a in v])) for k, v in found.items()}


def reduction(x: torch.Tensor) -> list[float]:
    """sqrt(sum over samples of (mean over positions of |x|)^2) for each unit, written out."""
    table = x.tolist()
    scores = []
    for unit in range(x.shape[2]):
        total = 0.0
        for sample in table:
            mean = math.fsum(abs(position[unit]) for position in sample) / len(sample)
            total += mean * mean
        scores.append(math.sqrt(total))
    return scores


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    """1 - mean over all positions of the cosine, written out."""
    cosines = []
    for x, y in zip(before.flatten(0, 1).tolist(), after.flatten(0, 1).tolist(), strict=True):
        dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
        cosines.append(dot / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y)))
    return 1 - math.fsum(cosines) / len(cosines)


def close(found: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


def blocks_of(values: list[float], width: int) -> list[float]:
    """L2 of each run of `width` values."""
    return [math.sqrt(math.fsum(v * v for v in values[i : i + width])) for i in range(0, len(values), width)]


@pytest.mark.parametrize("name", NORMS)
def test_against_explicit_loops(name: str) -> None:
    model, space = dense(name)
    ids = tokens(5, 9)
    scores = activation_scores(model, space, [ids[:2], ids[2:]])
    norms = [norm.format(i) for i in range(2) for norm in NORMS[name]]
    readers = [reader.format(i) for i in range(2) for reader in READERS[name]]
    layers = [LAYERS[name].format(i) for i in range(2)]
    seen = capture(model, [*norms, *readers, *layers], ids)

    assert (scores.samples, scores.tokens) == (5, 45)
    hidden = [math.fsum(parts) for parts in zip(*(reduction(seen[norm][1]) for norm in norms), strict=True)]
    assert close(scores.axes["hidden"], hidden)
    assert scores.axes["hidden"].dtype == torch.float32
    for i in range(2):
        heads_reader, ffn_reader = (reader.format(i) for reader in READERS[name])
        attention, ffn = (part.format(i) for part in NAMES[name])
        assert close(scores.axes[ffn], reduction(seen[ffn_reader][0]))
        columns = reduction(seen[heads_reader][0])
        assert close(scores.axes[f"{attention}heads"], blocks_of(columns, HEAD_DIMS[name]))
        if name not in ("gpt2", "gptj"):
            assert close(scores.axes[f"{attention}kv_groups"], blocks_of(columns, 2 * HEAD_DIMS[name]))
        assert scores.blocks[layers[i]] == pytest.approx(influence(*seen[layers[i]]), rel=1e-4)
    kinds = {axis.name for axis in space.axes if axis.kind in ("hidden", "heads", "kv_groups", "ffn")}
    assert set(scores.axes) == kinds
    assert set(scores.blocks) == set(layers)


def assert_same(a: Scores, b: Scores, tolerance: float = 1e-5) -> None:
    assert a.axes.keys() == b.axes.keys()
    for name, scores in a.axes.items():
        assert torch.allclose(scores, b.axes[name], rtol=tolerance, atol=0), name
    assert a.blocks == pytest.approx(b.blocks, rel=10 * tolerance)
    assert (a.samples, a.tokens) == (b.samples, b.tokens)


def test_batch_size_does_not_matter() -> None:
    model, space = dense("llama")
    ids = tokens(8, 9)
    one = activation_scores(model, space, torch.split(ids, 1))
    assert_same(one, activation_scores(model, space, torch.split(ids, 4)))
    assert_same(one, activation_scores(model, space, torch.split(ids, 3)))


def test_order_of_samples_does_not_matter_but_their_parting_does() -> None:
    """The mean is within a sample, the square over samples: longer rows are other samples."""
    model, space = dense("llama")
    ids = tokens(4, 8)
    scores = activation_scores(model, space, [ids])
    assert_same(scores, activation_scores(model, space, [ids.flip(0)]))
    merged = activation_scores(model, space, [ids.reshape(2, 16)])
    assert not torch.allclose(scores.axes["hidden"], merged.axes["hidden"], rtol=1e-2)


def test_padding_is_left_out() -> None:
    """Rows padded on the right and masked score as the same rows alone."""
    model, space = dense("llama")
    rows = [tokens(1, n, seed=n)[0] for n in (5, 9, 3)]
    alone = activation_scores(model, space, [row[None] for row in rows])
    ids, mask = torch.full((3, 11), 7), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    assert_same(alone, activation_scores(model, space, [{"input_ids": ids, "attention_mask": mask}]))
    whole = activation_scores(model, space, [ids])
    assert not torch.allclose(alone.axes["hidden"], whole.axes["hidden"], rtol=1e-2)


def test_a_mask_of_ones_and_labels_change_nothing() -> None:
    model, space = dense("llama")
    ids = tokens(3, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert_same(activation_scores(model, space, [ids]), activation_scores(model, space, [batch]), 1e-7)


def test_determinism() -> None:
    model, space = dense("qwen3")
    first, second = (activation_scores(model, space, [tokens(4, 9)]) for _ in range(2))
    assert all(torch.equal(first.axes[n], second.axes[n]) for n in first.axes)
    assert first.blocks == second.blocks


def test_only_what_is_asked_for() -> None:
    model, space = dense("llama")
    whole = activation_scores(model, space, [tokens()])
    axis = space.axis("model.layers.1.mlp.ffn")
    part = activation_scores(model, space, [tokens()], axes=[axis], layers=False)
    assert set(part.axes) == {axis.name}
    assert part.blocks == {}
    assert torch.equal(part.axes[axis.name], whole.axes[axis.name])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_and_mode_are_put_back() -> None:
    model = tiny("llama", dtype=torch.float32).train()
    space = discover(model)
    model.model.layers[1].eval()
    flags = [m.training for m in model.modules()]
    before = hooks(model)
    activation_scores(model, space, [tokens()])
    assert hooks(model) == before
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_removed_after_an_error() -> None:
    model, space = dense("llama")
    before = hooks(model)
    with pytest.raises(IndexError):
        activation_scores(model, space, [tokens(), torch.full((1, 3), 10**6)])
    assert hooks(model) == before
    assert not model.training


def test_no_batches() -> None:
    model, space = dense("llama")
    before = hooks(model)
    with pytest.raises(SecateurError, match="no calibration batch"):
        activation_scores(model, space, [])
    assert hooks(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_module(value: float) -> None:
    model = tiny("llama", dtype=torch.float32)
    space = discover(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(SecateurError, match=r"model\.layers\.1\.mlp\.down_proj"):
        activation_scores(model, space, [tokens()])


def test_influence_that_is_not_finite_is_an_error_too() -> None:
    """Nothing else is measured that could show the NaN."""
    model = tiny("llama", dtype=torch.float32)
    space = discover(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(SecateurError, match=r"model\.layers\.1"):
        activation_scores(model, space, [tokens()], axes=[])


def test_axis_that_nothing_reads() -> None:
    """Head dimensions of GPT-2 are read by c_proj; an axis that no module reads cannot be scored, and says so."""
    model, space = dense("gpt2")
    axis = space.axis("transformer.h.0.attn.head_dim")
    scores = activation_scores(model, space, [tokens()], axes=[axis], layers=False).axes[axis.name]
    seen = capture(model, ["transformer.h.0.attn.c_proj"], tokens())["transformer.h.0.attn.c_proj"][0]
    columns = reduction(seen)
    assert close(scores, [math.sqrt(math.fsum(columns[u + 12 * h] ** 2 for h in range(4))) for u in range(12)])
    unread = type(axis)("nobody", "ffn", 3, ())
    with pytest.raises(SecateurError, match="no module reads the units of nobody"):
        activation_scores(model, space, [tokens()], axes=[unread], layers=False)
