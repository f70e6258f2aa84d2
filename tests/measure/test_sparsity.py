"""The zeros of a model, against counts by hand and torch's own counter."""

import json
import zlib
from typing import Any

import pytest
import torch
from small_nets import Mlp, Mobile, Residual, pictures
from tiny import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import SecateurError
from secateur.measure.sparsity import Pattern, Statistics, statistics
from secateur.train import sparsify


def thinned(model: nn.Module, share: float = 0.4, seed: int = 0) -> Any:
    """The model with about this share of every tensor set to zero."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
            parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model.eval()


def by_name(found: Statistics) -> dict[str, Any]:
    return {w.name: w for w in found.weights}


def torch_macs(model: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return float(counter.get_total_flops() / 2 / len(x))


def test_counts_by_hand() -> None:
    model = thinned(Mlp())
    found = statistics(model, inputs=torch.zeros(5, 4))
    assert [w.name for w in found.weights] == ["up.weight", "mid.weight", "down.weight"]
    for weight in found.weights:
        values = model.get_parameter(weight.name).flatten().tolist()
        zeros = sum(v == 0 for v in values)
        assert 0 < zeros < len(values)
        assert (weight.elements, weight.zeros, weight.sparsity) == (len(values), zeros, zeros / len(values))
        assert (weight.macs, weight.macs_skipped) == (len(values), zeros)  # a linear layer, one row a sample
        assert weight.bytes == 4 * len(values)
        assert weight.bytes_bitmask == -(-len(values) // 8) + 4 * (len(values) - zeros)
    every = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = found.parameters
    assert (whole.elements, whole.zeros) == (len(every), int((every == 0).sum()))
    assert whole.sparsity == whole.zeros / whole.elements
    assert found.maskable.elements == 40 + 70 + 21
    assert found.maskable.zeros == sum(w.zeros for w in found.weights)
    assert found.maskable.macs_skipped == found.maskable.zeros
    assert found.left == {}


def test_bytes_of_tensors_that_a_bitmask_makes_larger() -> None:
    model = Mlp()  # no zeros at all
    found = statistics(model)
    assert found.parameters.bytes == 4 * found.parameters.elements
    assert found.parameters.bytes_bitmask == found.parameters.bytes
    assert all(w.bytes_bitmask > w.bytes for w in found.weights)
    half = statistics(thinned(Mlp()).to(torch.bfloat16))
    assert half.maskable.bytes_bitmask == sum(min(w.bytes, w.bytes_bitmask) for w in half.weights) < half.maskable.bytes
    assert half.maskable.bytes == 2 * half.maskable.elements


def test_patterns() -> None:
    linear = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1, 0, 0, 2, 0, 3, 4, 5.0], [0, 0, 0, 6, 0, 7, 0, 8]]))
    model = nn.Sequential(linear, nn.Linear(2, 3))
    found = by_name(statistics(model, patterns=[(2, 4), (1, 4), (3, 4), (1, 3)]))
    first = found["0.weight"].patterns
    assert first == {"2:4": Pattern(0.75, False), "1:4": Pattern(0.25, False), "3:4": Pattern(1.0, True), "1:3": None}
    assert found["1.weight"].patterns["2:4"] is None


def test_patterns_run_along_the_input_channels_of_a_convolution() -> None:
    conv = nn.Conv2d(4, 3, 3, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.weight[:, 1] = conv.weight[:, 2] = 0  # two of four channels at every place of the kernel
        conv.weight[0, 1, 0, 0] = 1
    (weight,) = statistics(conv, patterns=[(2, 4)]).weights
    assert weight.patterns == {"2:4": Pattern(26 / 27, False)}


@pytest.mark.parametrize(("model", "size"), [(Residual(), 6), (Mobile(), 9)], ids=["residual", "grouped"])
def test_macs_are_those_of_torch(model: nn.Module, size: int) -> None:
    x = pictures(3, size)
    model = thinned(model)
    found = statistics(model, inputs=x)
    assert found.maskable.macs == found.parameters.macs == torch_macs(model, x)
    for weight in found.weights:  # what is skipped is what torch would count without the zeros of each output
        assert weight.macs is not None
        assert weight.macs_skipped == pytest.approx(weight.macs * weight.sparsity)


def test_macs_skipped_of_a_convolution_by_hand() -> None:
    conv = thinned(nn.Conv2d(3, 4, 3, stride=2, bias=False))
    (weight,) = statistics(conv, inputs=pictures(2, 7)).weights
    zeros = int((conv.weight == 0).sum())
    assert (weight.macs, weight.macs_skipped) == (9 * 4 * 27, 9 * zeros)


class Up(nn.Module):
    """Transposed convolutions: strided, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
        self.second = nn.ConvTranspose2d(6, 8, 2, groups=2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x))


def test_macs_of_transposed_convolutions() -> None:
    model, x = thinned(Up()), torch.randn(3, 4, 5, 5)
    found = by_name(statistics(model, inputs=x))
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    first, second = found["first.weight"], found["second.weight"]
    assert (first.macs, first.macs_skipped) == (25 * 4 * 6 * 9, 25 * zeros["first.weight"])
    assert (second.macs, second.macs_skipped) == (81 * 6 * 4 * 4, 81 * zeros["second.weight"])


def test_recurrent_layers_are_seen() -> None:
    model = nn.LSTM(3, 5, batch_first=True)
    found = by_name(statistics(model, inputs=torch.zeros(2, 7, 3)))
    assert found["weight_ih_l0"].macs == 7 * 20 * 3
    assert found["weight_hh_l0"].macs == 7 * 20 * 5


def test_a_language_model_has_inputs_of_its_own_and_shared_tensors_count_once() -> None:
    model = thinned(tiny("llama", dtype=torch.float32, tie_word_embeddings=True))
    found = statistics(model)
    assert found.no_macs is None
    assert found.left["model.embed_tokens.weight"] == "an embedding"
    assert "lm_head.weight" not in {w.name for w in found.weights}
    assert found.parameters.elements == sum(p.numel() for p in model.parameters())
    length = found.weights[0].macs / found.weights[0].elements if found.weights[0].macs else 0
    assert length == int(length) > 1
    assert found.maskable.macs == length * found.maskable.elements
    assert found.parameters.macs == length * (found.maskable.elements + model.lm_head.weight.numel())
    assert found.parameters.macs_skipped == length * (found.maskable.zeros + int((model.lm_head.weight == 0).sum()))


def test_no_macs_without_inputs() -> None:
    found = statistics(thinned(Mlp()))
    assert found.no_macs is not None
    assert "pass `inputs`" in found.no_macs
    assert (found.weights[0].macs, found.maskable.macs, found.parameters.macs_skipped) == (None, None, None)
    assert found.maskable.zeros > 0


def test_a_weight_that_takes_no_part_has_no_macs() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.used(self.used(x)[:, :1].expand(-1, 4))

    found = statistics(Aside(), inputs=torch.zeros(2, 4))
    assert [w.macs for w in found.weights] == [2 * 12, None]
    assert found.maskable.macs == 2 * 12


def test_compressed_size_is_measured() -> None:
    model = thinned(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), share=0.9)
    raw = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    found = statistics(model, gzip=True)
    assert found.gzip == len(zlib.compress(raw, 6))
    assert found.gzip < found.parameters.bytes / 2
    assert zlib.decompress(zlib.compress(raw, 6)) == raw
    assert statistics(model).gzip is None
    assert statistics(model.to(torch.bfloat16), gzip=True).gzip is not None  # numpy knows no bfloat16


def test_only_and_ignore() -> None:
    found = statistics(thinned(Mlp()), only=["up", "mid"], ignore=["mid.weight"])
    assert [w.name for w in found.weights] == ["up.weight"]
    assert found.left == {"mid.weight": "ignored", "down.weight": "left out"}
    assert found.parameters.elements == sum(p.numel() for p in Mlp().parameters())


def test_json_values() -> None:
    found = statistics(thinned(Residual()), inputs=pictures(2), gzip=True).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["weights"][0]["patterns"] == {"2:4": None}  # three channels
    assert found["weights"][1]["patterns"]["2:4"].keys() == {"share", "all"}
    assert found["weights"][0]["shape"] == [8, 3, 3, 3]
    assert found["maskable"]["macs"] > 0


def test_the_model_is_as_it_was() -> None:
    model = thinned(Residual()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics(model, inputs=pictures(2))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_that_are_still_held() -> None:
    model = Mlp()
    held = sparsify(model, "sparsity=50%", schedule="constant")
    with pytest.raises(SecateurError, match=r"up.weight holds a mask of sparsify.*finalize first"):
        statistics(model)
    held.finalize()
    assert statistics(model).maskable.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": [(4, 2)]}, "the pattern 4:2 is none: N:M needs 0 < N < M"),
        ({"only": ["upp"]}, "'upp' matches no weight; did you mean 'up'"),
        (
            {"inputs": torch.zeros(2, 9)},
            r"Mlp does not run on these inputs \(RuntimeError: .*give inputs of the shapes",
        ),
        ({"inputs": 7}, "inputs must be a tensor, a tuple or a mapping"),
    ],
)
def test_bad_input(options: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        statistics(Mlp(), **options)


def test_a_model_without_values() -> None:
    with torch.device("meta"), pytest.raises(SecateurError, match=r"up\.weight is on the meta device"):
        statistics(Mlp())


def test_a_model_without_weights() -> None:
    with pytest.raises(SecateurError, match="BatchNorm1d has no weight to mask"):
        statistics(nn.BatchNorm1d(3))
