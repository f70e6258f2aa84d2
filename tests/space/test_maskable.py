"""Which weights a mask may thin out, and what their matrices meet: products made again from what was seen."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import mixture
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from secateur.errors import SecateurError
from secateur.space.products import Product, Products, plain_attention
from secateur.space.weights import Weight, blocks_of, maskable


class Raw(nn.Module):
    """Parameters that no module of torch.nn owns, multiplied in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(6, 5))
        self.left = nn.Parameter(torch.randn(4, 6))
        self.stack = nn.Parameter(torch.randn(3, 4, 7))
        self.joined = nn.Parameter(torch.randn(2, 3, 7))
        self.position = nn.Parameter(torch.randn(1, 2, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.flat.T  # [n, 6]
        x = (self.left @ x.T).T  # [n, 4]
        y = torch.bmm(x.expand(3, -1, -1), self.stack)  # [3, n, 7]
        y = y + self.position[:, :1]
        return torch.einsum("bnk,ehk->bneh", y, self.joined)


class Picked(nn.Module):
    """Slices of one parameter, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stack[1:3].unbind(0)
        return functional.linear(x, a) + functional.linear(2 * x, b[:, :])


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (4, 3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), (4, 3, 5)),
    "conv1d of transformers": (lambda: Conv1D(7, 5), (4, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        (2, 4, 9, 7),
    ),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 5, 6)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 5, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, stride=2, dilation=2, bias=False), (2, 3, 5, 6, 7)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=False), (2, 4, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=False),
        (2, 4, 5, 4),
    ),
    "transposed 2d, more padding than kernel": (
        lambda: nn.ConvTranspose2d(4, 6, 2, padding=2, bias=False),
        (2, 4, 6, 7),
    ),
    "transposed 3d grouped": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2, bias=False), (1, 4, 3, 2, 3)),
}


def products(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[Product], Any]:
    found: list[Product] = []

    def see(product: Product) -> None:
        found.append(product)
        assert torch.isfinite(product.read()).all()

    named = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad(), plain_attention(), Products(named, see):
        output = model(*args, **kwargs)
    return found, output


@pytest.mark.parametrize("name", MODULES)
def test_rows_times_the_matrix_is_what_the_module_gives(name: str) -> None:
    torch.manual_seed(1)
    make, shape = MODULES[name]
    module = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    (weight,) = maskable(module, x)
    seen, output = products(module, x)
    assert [p.part for p in seen] == weight.parts()
    tensor = module.get_parameter(weight.name).detach()
    made = torch.cat([p.read() @ weight.matrix(tensor, p.part).T for p in seen], 1)
    bias = getattr(module, "bias", None)
    channels_last = (
        output.movedim(1, -1) if ("conv" in name and "transformers" not in name) or "transposed" in name else output
    )
    want = channels_last.reshape(len(made), -1) - (0 if bias is None else bias)
    torch.testing.assert_close(made, want, rtol=1e-12, atol=1e-12)


def test_other_parameters_are_found_where_they_are_multiplied() -> None:
    torch.manual_seed(1)
    model, x = Raw().double(), torch.randn(8, 5, dtype=torch.float64)
    weights = {w.name: w for w in maskable(model, x)}
    forms = {name: (w.rows, w.columns) for name, w in weights.items()}
    assert forms == {"flat": ((0,), (1,)), "left": ((0,), (1,)), "stack": ((2,), (1,)), "joined": ((0, 1), (2,))}
    assert maskable(model, x).left == {"position": "no product with it is known"}
    seen, output = products(model, x)
    reads = {p.weight: p for p in seen}
    made = reads["joined"].read() @ weights["joined"].matrix(model.joined.detach(), reads["joined"].part).T
    torch.testing.assert_close(made.reshape(output.shape), output, rtol=1e-12, atol=1e-12)
    assert [p.part[0] for p in seen if p.weight == "stack"] == [(0, 1), (1, 2), (2, 3)]
    assert len(maskable(nn.Sequential(nn.Linear(2, 2), model))) == 1  # without inputs nobody knows


def test_a_slice_of_a_stack_is_placed() -> None:
    torch.manual_seed(1)
    model, x = Picked().double(), torch.randn(6, 3, dtype=torch.float64)
    (weight,) = maskable(model, x)
    seen, output = products(model, x)
    assert [p.part for p in seen] == [((1, 2), (0, 5), (0, 3)), ((2, 3), (0, 5), (0, 3))]
    made = sum(p.read() @ weight.matrix(model.stack.detach(), p.part).T for p in seen)
    torch.testing.assert_close(made, output, rtol=1e-12, atol=1e-12)
    assert len(weight.parts()) == 4


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch_is_seen_through_its_fused_pass(batch_first: bool) -> None:
    torch.manual_seed(1)
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    x, y = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    names = [w.name for w in maskable(model, (x, x, x))]
    assert names == ["in_proj_weight", "out_proj.weight"]
    itself, _ = products(model, x, x, x)
    assert [(p.weight, p.part[0]) for p in itself] == [("in_proj_weight", (0, 24)), ("out_proj.weight", (0, 8))]
    crossed, _ = products(model, x, y, y)
    assert [p.part[0] for p in crossed if p.weight == "in_proj_weight"] == [(0, 8), (8, 24)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_are_masked_and_routers_are_not(name: str) -> None:
    model = mixture(name, dtype=torch.float32)
    weights = maskable(model)
    stacked = [w for w in weights if ".experts." in w.name]
    assert stacked
    assert all(len(w.parts()) == w.shape[0] for w in stacked)
    routers = [n for n, why in weights.left.items() if why == "a router"]
    assert routers
    assert all(model.get_parameter(n).shape[0] in (6, 8) for n in routers)
    assert not [w for w in weights if w.name in routers]


def test_what_is_left_alone_is_named_and_can_be_asked_for() -> None:
    model = tiny("llama", tie_word_embeddings=False)
    weights = maskable(model)
    assert weights.left == {
        "model.embed_tokens.weight": "an embedding",
        "lm_head.weight": "the projection to the vocabulary",
    }
    assert len(weights) == 14
    asked = maskable(model, only=["lm_head", "*.1.mlp.*"])
    assert [w.name for w in asked] == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")] + [
        "lm_head.weight"
    ]
    ignored = maskable(model, ignore=["model.layers.0"])
    assert [w.name.split(".")[2] for w in ignored] == ["1"] * 7
    assert ignored.left["model.layers.0.mlp.up_proj.weight"] == "ignored"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["*.mpl.*"]}, r"the pattern '\*.mpl.\*' matches no weight; did you mean 'mlp'\?"),
        ({"ignore": ["model.layer.0"]}, r"'model.layer.0' matches no weight; did you mean 'model.layers.0'\?"),
        ({"only": ["model.layers.0"], "ignore": ["model"]}, "has no weight to mask"),
    ],
)
def test_patterns_that_match_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        maskable(tiny("llama"), **options)


def test_matrices_go_back_where_they_came_from() -> None:
    forms = [
        Weight("w", (6, 5), (0,), (1,)),
        Weight("w", (6, 5), (1,), (0,)),
        Weight("w", (6, 4, 3, 2), (0,), (2, 3, 1), 3),
        Weight("w", (6, 4, 3), (1,), (2, 0), 2),
        Weight("w", (4, 5, 6), (2,), (1,)),
        Weight("w", (4, 5, 6), (0, 1), (2,)),
    ]
    for weight in forms:
        tensor, copied = torch.randn(weight.shape), torch.zeros(weight.shape)
        for part in weight.parts():
            weight.put(copied, part, weight.matrix(tensor, part))
        assert torch.equal(copied, tensor)
        assert sum(weight.matrix(tensor, part).numel() for part in weight.parts()) == weight.size
    assert (forms[2].channels, forms[3].channels, forms[5].channels) == (4, 3, 6)


def test_the_model_is_as_it_was() -> None:
    model = tiny("llama").train()
    before = copy.deepcopy(model.state_dict())
    maskable(model, {"input_ids": tokens()})
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_blocks() -> None:
    names = [w.name for w in maskable(tiny("llama"))]
    assert set(blocks_of(tiny("llama"), names).values()) == {"model.layers.0", "model.layers.1"}
    assert blocks_of(nn.Linear(2, 2), ["weight"]) == {"weight": "weight"}


class Routed(nn.Module):
    """Experts that are linear layers, behind a linear router whose largest results choose."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.choose = choose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odds = self.gate(x).softmax(-1)
        if self.choose == "topk":
            index = odds.topk(1).indices[:, 0]
        elif self.choose == "argmax":
            index = odds.argmax(-1)
        elif self.choose == "max":
            index = odds.max(-1).indices
        else:
            index = odds.sort(-1, descending=True).indices[:, 0]
        rows = [self.experts[i](x[index == i]) for i in range(3)]
        return torch.cat(rows)


@pytest.mark.parametrize("choose", ["topk", "argmax", "max", "sort"])
def test_linear_routers_are_known_by_what_is_done_with_their_results(choose: str) -> None:
    weights = maskable(Routed(choose), torch.randn(8, 6))
    assert weights.left == {"gate.weight": "a router"}
    assert len(weights) == 3
    assert [w.name for w in maskable(Routed(choose), torch.randn(8, 6), only=["gate"])] == ["gate.weight"]


class Cast(nn.Module):
    """A weight that is multiplied in another type than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.own.float())


def test_a_weight_in_another_type_is_still_that_weight() -> None:
    model, x = Cast(), torch.randn(5, 6)
    assert [w.name for w in maskable(model, x)] == ["own"]
    (product,), _ = products(model, x)
    assert torch.equal(product.read(), x)


def test_parameters_that_share_one_storage_are_told_apart() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)), torch.randn(3, 4)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    seen, _ = products(model, x)
    assert [p.weight for p in seen] == ["0.weight", "1.weight"]


def test_what_is_no_weight_by_its_name_is_none() -> None:
    model = nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
    with pytest.raises(SecateurError, match="has no weight to mask"):
        maskable(model)


def test_one_pattern_may_be_a_text_and_name_what_is_left_alone_anyway() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert len(maskable(model, ignore="lm_head")) == 14
    assert [w.name for w in maskable(model, only="lm_head")] == ["model.embed_tokens.weight"]
    with pytest.raises(SecateurError, match="does not run on the inputs"):
        maskable(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))
