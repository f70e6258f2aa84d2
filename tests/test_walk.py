"""The walk: what each block is calibrated on is what the whole model, changed so far, would give it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import mixture
from tiny import VOCAB, tiny, tokens
from torch import nn
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.score.grams import Gram, grams
from secateur.space.products import plain_attention
from secateur.space.weights import Part, Weight, maskable
from secateur.walk import walk

Found = dict[tuple[str, Part], Gram]


class Res(nn.Module):
    """A block with an activation in place, and a way around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.second(functional.relu(self.norm(self.first(x)), inplace=True))
        return functional.relu_(x.add_(inner))  # what it was given is gone


class Net(nn.Module):
    """A stem, blocks in two lists, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.early = nn.Sequential(Res(6), Res(6))
        self.wider = nn.Conv2d(6, 8, 1)
        self.late = nn.ModuleList([Res(8), Res(8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wider(self.early(functional.relu(self.stem(x))))
        for block in self.late:
            x = block(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """No list at all, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))  # type: ignore[no-any-return]


class Between(nn.Module):
    """What runs between the blocks changes their results, and a mask, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = functional.relu_(block(x))
            x += 1
        return x


class Shares(nn.Module):
    """Weights that read the same at times, and at others not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x + 1
        return self.a(x) + self.c(x) + self.a(y) + self.b(y)  # type: ignore[no-any-return]


class Skips(nn.Module):
    """A list whose members get sums, and what came long before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks:
            kept.append(x)
            x = block(x + sum(kept))
        return x


def images(count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, 9, 9, generator=generator) for n in (4, 4, count - 2)]


def rows(width: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, width, generator=generator) for n in (6, 6, 2)]


def text(**more: torch.Tensor) -> list[Batch]:
    return [*({"input_ids": tokens(3, 10, seed=s), **more} for s in (1, 2)), {"input_ids": tokens(2, 7, seed=4)}]


def translation() -> list[Batch]:
    return [{"input_ids": tokens(2, 9, seed=s), "decoder_input_ids": tokens(2, 6, seed=s + 9)} for s in (1, 2)]


def padded() -> list[Batch]:
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[1, 7:] = 0
    return [{"input_ids": tokens(3, 10, seed=s), "attention_mask": mask} for s in (1, 2)]


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30}


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=VOCAB, **SIZES))  # type: ignore[no-any-return]


def albert() -> nn.Module:
    return AlbertForMaskedLM(AlbertConfig(vocab_size=VOCAB, embedding_size=12, **SIZES))  # type: ignore[no-any-return]


def deberta() -> nn.Module:
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True, "position_buckets": 8}
    config = DebertaV2Config(vocab_size=VOCAB, max_relative_positions=16, **SIZES, **more)
    return DebertaV2Model(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 30, "num_layers": 2, "num_heads": 3}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]]]] = {
    "llama": (lambda: tiny("llama"), text),
    "llama, a mask in some batches": (lambda: tiny("llama"), lambda: [*text(), *padded(), *text()]),
    "gpt2, a mask in some batches": (lambda: tiny("gpt2"), lambda: [*text(), *padded()]),
    "deberta: keys and queries share": (deberta, padded),
    "llama padded": (lambda: tiny("llama"), padded),
    "gemma2: two kinds of masks": (lambda: tiny("gemma2"), text),
    "gpt2": (lambda: tiny("gpt2"), text),
    "t5: two stacks, a bias handed on": (t5, translation),
    "bert": (bert, text),
    "albert: one layer many times": (albert, text),
    "mixture, grouped": (lambda: mixture("mixtral", dtype=torch.float32), text),
    "mixture, one by one": (lambda: mixture("mixtral", experts_implementation="eager"), text),
    "cnn": (Net, images),
    "sequential": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)
        ),
        lambda: rows(5),
    ),
    "plain": (Plain, lambda: rows(5)),
    "in place between blocks": (Between, lambda: rows(6)),
    "shared inputs at times": (Shares, lambda: rows(6)),
    "skips": (Skips, lambda: rows(6)),
}


def collected(model: nn.Module, batches: list[Batch], weights: tuple[Weight, ...]) -> Found:
    """The slow way: run the whole model, and watch some weights."""

    def forward() -> None:
        for batch in batches:
            run(model, batch)

    with evaluating(model), torch.no_grad(), plain_attention():
        return flat(grams(forward, weights, dict(model.named_parameters()), full=True))


def hooked(model: nn.Module, batches: list[Batch], weights: tuple[Weight, ...]) -> dict[str, torch.Tensor]:
    """X'X of linear layers, by hooks on the modules: nothing of ours is in the way."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for weight in weights:
        module = model.get_submodule(weight.name.rpartition(".")[0])
        if isinstance(module, nn.Linear):

            def see(_: nn.Module, args: tuple[torch.Tensor, ...], *, name: str = weight.name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                found[name] = found.get(name, torch.zeros(())) + x.T @ x

            handles.append(module.register_forward_pre_hook(see))
    with evaluating(model), torch.no_grad():
        for batch in batches:
            run(model, batch)
    for handle in handles:
        handle.remove()
    return found


def flat(groups: list[Any]) -> Found:
    return {(r.weight.name, r.part): r.gram for group in groups for r in group if r.gram is not None}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_calibrated_on_what_the_changed_model_gives(name: str) -> None:
    torch.manual_seed(0)
    make, data = CASES[name]
    kind, close = (torch.float32, 1e-4) if "grouped" in name else (torch.float64, 1e-9)
    model, batches = make().to(kind), data()
    batches = [b.double() if isinstance(b, torch.Tensor) and b.is_floating_point() else b for b in batches]
    slow = copy.deepcopy(model)
    before = [b.clone() if isinstance(b, torch.Tensor) else b for b in batches]
    weights = maskable(model)
    visited: list[str] = []
    for stage in walk(model, batches, weights.chosen):
        parameters, others = dict(model.named_parameters()), dict(slow.named_parameters())
        fast = flat(grams(stage.run, stage.weights, parameters, full=True, last=stage.last))
        want = collected(slow, [b.clone() if isinstance(b, torch.Tensor) else b for b in before], stage.weights)
        assert fast.keys() == want.keys(), stage.name
        for key, gram in want.items():
            assert gram.rows == fast[key].rows
            torch.testing.assert_close(fast[key].full(), gram.full(), rtol=close, atol=close)
        alone = hooked(slow, [b.clone() if isinstance(b, torch.Tensor) else b for b in before], stage.weights)
        for weight_name, matrix in alone.items():
            ours = [gram.full() for (of, _), gram in fast.items() if of == weight_name]
            torch.testing.assert_close(ours[0] if ours else 0 * matrix, matrix, rtol=close, atol=close)
        visited += [w.name for w in stage.weights]
        for weight in stage.weights:  # a change that later blocks feel
            for tensors in (parameters, others):
                tensors[weight.name].data[..., ::2] = 0
    assert sorted(visited) == sorted(w.name for w in weights)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def calls(model: nn.Module, path: str, batches: list[Batch]) -> int:
    """How often a module runs in a whole walk."""
    count = 0

    def see(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.get_submodule(path).register_forward_hook(see)
    for stage in walk(model, batches, maskable(model).chosen):
        stage.run()
    handle.remove()
    return count


def test_a_block_of_a_language_model_runs_twice_for_each_batch_and_the_last_once() -> None:
    model, batches = tiny("llama"), text()
    last = len(model.model.layers) - 1
    probe = 2  # one for each kind of batch: they have two lengths
    assert calls(model, "model.layers.0", batches) == 2 * len(batches) + probe
    assert calls(model, f"model.layers.{last}", batches) == len(batches) + probe
    assert calls(model, "lm_head", batches) == probe


def test_weights_that_nothing_reaches_come_last() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.used = nn.Linear(4, 4), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    model = Idle()
    stages = [(s.name, [w.name for w in s.weights]) for s in walk(model, rows(5), maskable(model).chosen)]
    assert stages == [("used", ["used.weight"]), ("weights that no calibration data reaches", ["idle.weight"])]


def test_modes_come_back_and_data_must_be_there() -> None:
    model = Net().train()
    model.late[0].eval()
    for stage in walk(model, images(), maskable(model).chosen):
        stage.run()
    assert model.training
    assert not model.late[0].training
    with pytest.raises(SecateurError, match="no calibration batch"):
        next(iter(walk(model, [], maskable(model).chosen)))


def test_a_call_without_rows_counts_for_nothing() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.some, self.none = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.some(x), self.none(x[:0])])

    model = Empty()
    groups = [
        group
        for stage in walk(model, rows(5), maskable(model).chosen)
        for group in grams(stage.run, stage.weights, dict(model.named_parameters()), full=True, last=stage.last)
    ]
    assert {read.weight.name: read.gram is None for group in groups for read in group} == {
        "some.weight": False,
        "none.weight": True,
    }


def test_batches_that_take_other_ways_are_refused_with_a_reason() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = (nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.early if len(x) == 6 else self.late:
                x = layer(x)
            return x

    model = Either()
    with pytest.raises(SecateurError, match=r"early\.0 runs on 2 of 3 calibration batches"):
        for stage in walk(model, rows(5), maskable(model).chosen):
            stage.run()


def test_what_a_user_hooks_on_a_block_is_run_once() -> None:
    model, batches = tiny("llama"), text()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
    weights = maskable(model).chosen
    want = hooked(model, batches, weights)
    for stage in walk(model, batches, weights):
        for group in grams(stage.run, stage.weights, dict(model.named_parameters()), full=True, last=stage.last):
            for read in group:
                assert read.gram is not None
                torch.testing.assert_close(read.gram.full(), want[read.weight.name], rtol=1e-9, atol=1e-9)
