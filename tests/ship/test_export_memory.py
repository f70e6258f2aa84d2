"""A model that does not fit into memory is refused before anything is done."""

from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch import nn

from secateur.errors import SecateurError
from secateur.measure import bench_memory
from secateur.ship import memory
from secateur.ship.memory import available_memory, check_folder_memory, check_memory
from secateur.ship.onnx import export_onnx
from secateur.ship.openvino import export_openvino
from secateur.ship.program import export_program


def test_a_model_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    monkeypatch.setattr(memory, "available_memory", lambda: (8 << 20) - 1)
    for export, name in ((export_onnx, "m.onnx"), (export_openvino, "m.xml"), (export_program, "m.pt2")):
        with pytest.raises(
            SecateurError, match=r"Linear: .* needs about .* \(2 x its weights of .*\), and .* are free"
        ):
            export(model, torch.randn(2, 1024), tmp_path / name)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "available_memory", lambda: 8 << 20)
    check_memory(model, "a test")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(model, "a test")


def test_a_folder_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    size = (tmp_path / "m/model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * size)
    check_folder_memory(str(tmp_path / "m"), "a test")
    with pytest.raises(SecateurError, match=r"m: a test needs about .* \(3 x its weights of"):
        check_folder_memory(str(tmp_path / "m"), "a test", dtype=torch.float32)


def test_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (available_memory() or 0) > 1 << 20
    monkeypatch.setattr(bench_memory, "_GROUP", tmp_path)
    monkeypatch.setattr(bench_memory, "_FREE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   70 kB\n")
    assert available_memory() == 70 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory() == 70 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    assert available_memory() == 49000
    (tmp_path / "memory.stat").write_text("inactive_file 500\n")
    assert available_memory() == 49500, "what files are kept in memory is given back when it is needed"
