"""OpenVINO models: its runtime gives what torch gives, at other sizes too."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, logits, tiny, tokens
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.measure.openvino import OpenvinoModel
from secateur.ship.openvino import OpenvinoExport, export_openvino


class Net(nn.Module):
    """A convolution, a batch norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(torch.relu(self.norm(self.conv(image))).mean((2, 3)))
        return result


class Liar(Net):
    """Does something else while it is exported."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) + (1 if torch.compiler.is_exporting() else 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, OpenvinoExport]:
    model = tiny("llama", dtype=torch.float32)
    out = tmp_path_factory.mktemp("openvino") / "new" / "llama.xml"
    return model, out, export_openvino(model, tokens(), out)


def test_a_language_model_at_any_size(llama: Any) -> None:
    model, out, report = llama
    assert report.inputs == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert report.outputs == {"logits": ["batch", "sequence", VOCAB]}
    assert report.checked == [{name: [3, 14] for name in report.inputs}, {name: [1, 5] for name in report.inputs}]
    assert 0 < report.max_rel_error < 1e-5
    files = sorted(out.parent.iterdir())
    assert [p.name for p in files] == ["llama.bin", "llama.xml"]
    assert report.bytes == sum(p.stat().st_size for p in files)
    file = OpenvinoModel(out, threads=1)
    assert file.threads == 1
    ids = tokens(4, 20, seed=2)
    torch.testing.assert_close(file(ids), logits(model, ids), atol=1e-5, rtol=1e-4)
    found = secateur.evaluate(file, ids, against=model)
    assert found["top1"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_a_network_of_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    dynamic = {"image": {0: "batch", 2: "height"}}
    report = export_openvino(model, torch.zeros(2, 3, 8, 8), tmp_path / "net.xml", dynamic=dynamic)
    assert report.inputs == {"image": ["batch", 3, "height", 8]}
    assert report.max_abs_error > 0, "zeros say nothing: the inputs of the check are random"
    x = torch.randn(3, 3, 11, 8)
    torch.testing.assert_close(OpenvinoModel(tmp_path / "net.xml")(image=x), model(x).detach(), atol=1e-5, rtol=1e-4)
    half = export_openvino(model, torch.randn(2, 3, 8, 8), tmp_path / "half.xml", half_weights=True)
    assert (tmp_path / "half.bin").stat().st_size < 0.6 * (tmp_path / "net.bin").stat().st_size
    assert 1e-5 < half.max_rel_error < 1e-2
    assert half.half_weights


def test_files_that_disagree_are_not_written(tmp_path: Path) -> None:
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text("old")
    with pytest.raises(SecateurError, match=r"Liar: output on image .* differs between OpenVINO and torch by"):
        export_openvino(Liar(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml", overwrite=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m.xml": "old", "m.bin": "old"}
    (tmp_path / "m.xml").unlink()
    with pytest.raises(SecateurError, match=r"m.bin: exists already"):
        export_openvino(Net(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml")


def test_mistakes(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.xml").write_text("<net")
    (tmp_path / "bad.bin").write_bytes(b"")
    (tmp_path / "alone.xml").write_text("<net")
    for name, message in (
        ("none.xml", "there is no such file"),
        ("alone.xml", "its tensors, alone.bin, are not beside it"),
        ("bad.xml", "OpenVINO cannot load it"),
    ):
        with pytest.raises(SecateurError, match=message):
            OpenvinoModel(tmp_path / name)
    with pytest.raises(SecateurError, match=r"an OpenVINO model must end in .xml"):
        export_openvino(Net(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    with pytest.raises(SecateurError, match=r"conv.weight is bfloat16, which OpenVINO runs"):
        export_openvino(Net().bfloat16(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml")
    with pytest.raises(SecateurError, match=r"has no input 'image'; known: attention_mask, input_ids"):
        OpenvinoModel(llama[1])(image=tokens())
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SecateurError, match=r"needs openvino .*pip install 'secateur\[openvino\]'"):
        export_openvino(Net(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml")
