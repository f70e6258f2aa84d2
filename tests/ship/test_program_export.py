"""Programs of torch.export: read back, they give what the model gives, without its code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, logits, tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.ship import program
from secateur.ship.program import export_program


class Two(nn.Module):
    """Two inputs by place, a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, scale: float, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.up(x) * scale, self.up(y)


def test_a_language_model_runs_without_its_code(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    report = export_program(model, None, tmp_path / "m.pt2")
    assert report.inputs == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert report.outputs == {"logits": ["batch", "sequence", VOCAB]}
    assert report.max_rel_error < 1e-6
    assert report.bytes == (tmp_path / "m.pt2").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert "forward" not in vars(model)
    ids = tokens(4, 17)
    torch.save({"ids": ids, "logits": logits(model, ids)}, tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load('x.pt'); m = torch.export.load('m.pt2').module();"
        "y = m(input_ids=x['ids'], attention_mask=torch.ones_like(x['ids']))['logits'];"
        "torch.testing.assert_close(y, x['logits'], atol=1e-5, rtol=1e-4);"
        "assert not {'transformers', 'secateur'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_several_inputs_and_bfloat16(tmp_path: Path) -> None:
    model = Two().bfloat16()
    example = (torch.randn(2, 6), 3.0, torch.randn(2, 6))
    bf16 = tuple(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in example)
    report = export_program(model, bf16, tmp_path / "m.pt2")
    assert report.inputs == {"x": ["batch", 6], "y": ["batch", 6]}
    assert report.outputs == {"output_0": ["batch", 4], "output_1": ["batch", 4]}
    x = torch.randn(5, 6).bfloat16()
    found: Any = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(found(x=x, y=x)[0], model(x, 3.0, x)[0])
    fixed = export_program(Two(), example, tmp_path / "fixed.pt2", dynamic=False)
    assert fixed.inputs == {"x": [2, 6], "y": [2, 6]}


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6)
    with pytest.raises(SecateurError, match=r"a torch.export file must end in .pt2"):
        export_program(nn.Linear(6, 3), x, tmp_path / "m.onnx")
    leaves = program._leaves
    monkeypatch.setattr(program, "_leaves", lambda *args: [y + 1 for y in leaves(*args)])
    with pytest.raises(SecateurError, match=r"Linear: output on input \[3, 6\] differs between the program and torch"):
        export_program(nn.Linear(6, 3), x, tmp_path / "m.pt2")
    monkeypatch.undo()

    def broken(*_: Any) -> None:
        raise RuntimeError("no space for it")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(SecateurError, match=r"Linear: torch.export cannot store it \(no space for it\)"):
        export_program(nn.Linear(6, 3), x, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
