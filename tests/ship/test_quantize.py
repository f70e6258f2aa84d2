"""INT8 files: near the float ones, a quarter of their size, and with zeros where pruning made zeros."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny import VOCAB, tiny, tokens
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.measure.onnx import OnnxModel
from secateur.ship import files
from secateur.ship.onnx import export_onnx
from secateur.ship.quantize import quantize_onnx

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
HEAD = "lm_head.weight"


class Net(nn.Module):
    """A convolution, a batch norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return result


def halved(model: Any) -> Any:
    """Half of every weight of two dimensions or more is zero, as masks leave it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape, generator=generator) < 0.5)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A masked Llama whose projection is tied to its embeddings, and its float file."""
    model = halved(tiny("llama", dtype=torch.float32, tie_word_embeddings=True, hidden_size=64))
    out = tmp_path_factory.mktemp("float") / "llama.onnx"
    export_onnx(model, tokens(), out)
    return model, out


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(2)
    model = halved(Net()).eval()
    out = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(model, torch.randn(2, 3, 8, 8), out)
    return model, out


def tensors_of(path: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def dequantized(path: Path, name: str) -> Any:
    """A weight as the file means it, in the layout of torch; the number of its INT8 tensors must be one."""
    tensors = tensors_of(path)
    (full,) = [n for n in tensors if n.startswith(name) and n.endswith("_quantized") and tensors[n].ndim > 1]
    stem = full.removesuffix("_quantized")
    values = tensors[full].astype(np.float32)
    assert tensors[full].dtype == np.int8
    if f"{stem}_row_scale" in tensors:
        return torch.from_numpy(values * tensors[f"{stem}_row_scale"])
    assert not tensors[f"{stem}_zero_point"].any(), "zero is no longer zero"
    scale = tensors[f"{stem}_scale"]
    if values.ndim == 4:
        return torch.from_numpy(values * scale.reshape(-1, 1, 1, 1))
    stands = "fc" in name and not stem.endswith("_Transposed")  # a Gemm, which transposes by itself
    return torch.from_numpy(values * scale.reshape(-1, 1) if stands else (values * scale).T)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within a few steps of 8 bits."""
    return float((found - expected).abs().max() / expected.abs().max()) < 0.03


def check_zeros(model: Any, path: Path, names: list[str]) -> None:
    """What is zero stays zero, and what is not is near: half a step of its row, or less."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        weight, found = parameters[name].detach(), dequantized(path, name)
        assert not found[weight == 0].any(), name
        zeros, kept = int((weight == 0).sum()), int((found == 0).sum())
        assert 0 < zeros <= kept < zeros + weight.numel() / 20, "few others are so small that they become zeros"
        largest = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1))
        assert bool(((found - weight).abs() <= 0.51 * largest / 127).all()), name


def test_dynamic_language_model(llama: Any, tmp_path: Path) -> None:
    model, path = llama
    out = tmp_path / "int8.onnx"
    report = quantize_onnx(path, out)
    weights = [n for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1 and "embed" not in n]
    assert report.quantized == sorted(weights)
    assert (report.left, report.mode, report.calibration_samples) == ([], "dynamic", 0)
    assert (report.bytes_before, report.bytes_after) == (path.stat().st_size, out.stat().st_size)
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
    check_zeros(model, out, weights)
    found = secateur.evaluate(OnnxModel(out), tokens(4, 20), against=model)
    assert 1e-7 < found["kl"] < 1e-3
    assert found["top1"] > 0.9


def test_a_tied_table_is_stored_once(llama: Any, tmp_path: Path) -> None:
    _, path = llama
    sizes = {name: value.nbytes for name, value in tensors_of(path).items() if name == HEAD}
    assert sizes == {HEAD: VOCAB * 64 * 4}
    quantize_onnx(path, tmp_path / "a.onnx")
    large = {n: v.nbytes for n, v in tensors_of(tmp_path / "a.onnx").items() if v.nbytes >= VOCAB * 64}
    assert large == {f"{HEAD}_quantized": VOCAB * 64}
    report = quantize_onnx(path, tmp_path / "b.onnx", embeddings=False)
    large = {n: v.nbytes for n, v in tensors_of(tmp_path / "b.onnx").items() if v.nbytes >= VOCAB * 64}
    assert large == {HEAD: VOCAB * 64 * 4, f"{HEAD}.transposed_quantized": VOCAB * 64}
    assert HEAD in report.quantized
    assert report.left == [HEAD]
    one_scale = quantize_onnx(path, tmp_path / "c.onnx", per_channel=False)
    assert one_scale.left == []
    kl = {
        name: secateur.evaluate(OnnxModel(tmp_path / f"{name}.onnx"), tokens(4, 20), against=llama[0])["kl"]
        for name in "abc"
    }
    assert max(kl.values()) < 2e-3
    assert kl["a"] < kl["c"], "a scale for each output is finer than one for all"


def test_static_language_model(llama: Any, tmp_path: Path) -> None:
    model, path = llama
    rows = list(torch.split(tokens(12, 20, seed=9), 4))
    mapping = {"input_ids": rows[0], "attention_mask": torch.ones_like(rows[0])}
    report = quantize_onnx(path, tmp_path / "int8.onnx", mode="static", calibration=[mapping, *rows[1:]], samples=10)
    assert (report.left, report.calibration_samples) == ([], 10)
    check_zeros(model, tmp_path / "int8.onnx", report.quantized)
    found = secateur.evaluate(OnnxModel(tmp_path / "int8.onnx"), tokens(4, 20), against=model)
    assert 1e-7 < found["kl"] < 2e-3
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "DynamicQuantizeLinear" not in kinds


def test_excluded_weights_are_as_they_were(llama: Any, tmp_path: Path) -> None:
    _, path = llama
    before = tensors_of(path)
    report = quantize_onnx(path, tmp_path / "int8.onnx", exclude=["*.down_proj.*", HEAD])
    down = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert report.left == sorted([HEAD, *down])
    assert not set(report.left) & set(report.quantized)
    after = tensors_of(tmp_path / "int8.onnx")
    for name in down:
        assert np.array_equal(after[name], before[name])
    with pytest.raises(SecateurError, match=r"'\*.down' matches no weight"):
        quantize_onnx(path, tmp_path / "b.onnx", exclude=["*.down"])


@pytest.mark.parametrize("ranges", [None, "minmax"])
def test_static_convolutions(net: Any, tmp_path: Path, ranges: str | None) -> None:
    model, path = net
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibration = [(x, torch.zeros(32, dtype=torch.int64))]
    out = tmp_path / "int8.onnx"
    report = quantize_onnx(path, out, mode="static", calibration=calibration, ranges=ranges)
    assert report.quantized == ["conv.weight", "fc.weight"]
    tensors = tensors_of(out)
    zeros = model.conv.weight.detach().numpy() == 0
    assert not tensors["conv.weight_quantized"][zeros].any()
    assert not tensors["conv.weight_zero_point"].any()
    check_zeros(model, out, ["fc.weight"])
    assert near(OnnxModel(out)(x), model(x).detach())


def test_dynamic_leaves_convolutions_and_says_so(net: Any, tmp_path: Path) -> None:
    report = quantize_onnx(net[1], tmp_path / "int8.onnx")
    assert (report.quantized, report.left) == (["fc.weight"], ["conv.weight"])
    with pytest.raises(SecateurError, match="finds no weight that it could make INT8: convolutions need mode static"):
        quantize_onnx(net[1], tmp_path / "none.onnx", exclude=["fc.*"])
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


def test_the_example_classifier_stays_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DIGITS))
    digits: Any = importlib.import_module("digits")
    model = digits.trained()
    export_onnx(model, torch.randn(2, 1, 24, 24), tmp_path / "cnn.onnx")
    report = quantize_onnx(
        tmp_path / "cnn.onnx", tmp_path / "int8.onnx", mode="static", calibration=digits.calibration()
    )
    assert report.bytes_after < 0.3 * report.bytes_before
    found = secateur.evaluate(OnnxModel(tmp_path / "int8.onnx"), [digits.images("test", 400)], against=model)
    assert found["accuracy"] > found["dense_accuracy"] - 0.01
    assert found["top1"] > 0.97


def test_batch_norms_of_other_exporters_are_merged(tmp_path: Path) -> None:
    """A file with a batch norm after a convolution, which this exporter does not write."""
    generator = np.random.default_rng(0)

    def values(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(generator.uniform(0.5, 1, shape).astype(np.float32), name)

    constants = [values("w", 4, 3, 3, 3), *(values(name, 4) for name in ("scale", "bias", "mean", "var"))]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("BatchNormalization", ["y", "scale", "bias", "mean", "var"], ["z"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, None, None]) for n, c in (("x", 3), ("z", 4))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "bn.onnx")
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    quantize_onnx(tmp_path / "bn.onnx", tmp_path / "int8.onnx", mode="static", calibration=[x])
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert near(OnnxModel(tmp_path / "int8.onnx")(x), OnnxModel(tmp_path / "bn.onnx")(x))


def test_large_files(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = net
    monkeypatch.setattr(files, "LIMIT", 100)
    export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    for mode in ("dynamic", "static"):
        rows = [torch.randn(8, 3, 8, 8)] if mode == "static" else None
        report = quantize_onnx(tmp_path / "net.onnx", tmp_path / f"{mode}.onnx", mode=mode, calibration=rows)
        paths = [tmp_path / f"{mode}.onnx", tmp_path / f"{mode}.onnx.data"]
        assert report.bytes_after == sum(file.stat().st_size for file in paths)
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(OnnxModel(paths[0])(x), model(x).detach(), atol=0.05, rtol=0.05)
    assert len(list(tmp_path.iterdir())) == 6


def test_mistakes(net: Any, tmp_path: Path) -> None:
    path, rows = net[1], [torch.randn(2, 3, 8, 8)]
    quantize_onnx(path, tmp_path / "int8.onnx")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "statik"}, "there is no mode 'statik' of quantisation; did you mean 'static'"),
        ({"mode": "static"}, "static quantisation needs calibration data"),
        ({"mode": "static", "calibration": []}, "needs at least one calibration batch"),
        ({"calibration": rows}, "dynamic quantisation takes no calibration data"),
        ({"ranges": "minmax"}, "found by calibration, which dynamic quantisation has not"),
        ({"mode": "static", "calibration": rows, "ranges": "mean"}, "there are no ranges 'mean'"),
        ({"mode": "static", "calibration": rows, "samples": 0}, "samples must be at least 1, not 0"),
        ({"mode": "static", "calibration": [rows[0][:, :2]]}, r"x has the shape \[2, 2, 8, 8\], and the file takes"),
        ({"path": tmp_path / "int8.onnx"}, "is quantised already"),
        ({"path": tmp_path / "none.onnx"}, "there is no such file"),
        ({"out": path, "overwrite": True}, "is the float file itself"),
        ({"out": tmp_path / "int8.onnx"}, "exists already"),
    ]
    for change, message in cases:
        given: dict[str, Any] = {"path": path, "out": tmp_path / "new.onnx", **change}
        with pytest.raises(SecateurError, match=message):
            quantize_onnx(given.pop("path"), given.pop("out"), **given)
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
