"""``secateur check``: exit codes 0, 2 and 3, the slices, the report of the model, what is printed and written."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_models import save_model, write_data

from secateur.cli import main
from secateur.load.functions import find_function
from secateur.load.model import load_model, quiet_transformers
from secateur.measure.quality import perplexity
from secateur.ship.onnx import export_onnx

MINE = """
import torch
from torch import nn

torch.manual_seed(0)
X, Y = torch.randn(90, 4), torch.arange(90) % 3


class Net(nn.Module):
    def __init__(self, broken):
        super().__init__()
        torch.manual_seed(1)
        self.lin, self.broken = nn.Linear(4, 3), broken

    def forward(self, x):
        out = self.lin(x)
        return torch.cat([out[:, :2], out[:, 2:] - 9.0], 1) if self.broken else out


def dense():
    return Net(False).eval()


def small():
    return Net(True).eval()


def pairs():
    return [(X[:50], Y[:50]), (X[50:], Y[50:])]


def slices():
    return {"first": [(X[:30], Y[:30])], "rest": [(X[30:], Y[30:])]}


def domain(batch):
    return ["even" if i % 2 == 0 else "odd" for i in range(len(batch))]


def wrong():
    return [{"y": X, "labels": Y}]


def empty():
    return {"first": []}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("check")
    save_model(base / "dense", num_hidden_layers=1)
    save_model(base / "small", seed=1, num_hidden_layers=1)
    sure: Any = load_model(base / "small")[0]  # surer, and no more often right: its loss is higher
    with torch.no_grad():
        sure.model.norm.weight.mul_(6)
    with quiet_transformers():
        sure.save_pretrained(base / "small")
    save_model(base / "words", vocab_size=272, num_hidden_layers=1)
    write_data(base / "data")
    (base / "gate_mine.py").write_text(MINE)
    ids = torch.from_numpy(np.load(base / "data/ids.npy"))
    losses = {side: math.log(perplexity(load_model(base / name)[0], [ids])) for side, name in
              (("dense", "dense"), ("pruned", "small"))}  # fmt: skip
    measured = {"perplexity": {side: math.exp(loss) for side, loss in losses.items()}}
    (base / "small/report.json").write_text(json.dumps({"format": 1, "measured": measured}))
    texts = ["The gardener cuts. " * 9, "#include <stdio.h>\n" * 9]
    lines = [json.dumps({"text": texts[i % 2][i:], "domain": ["prose", "code"][i % 2]}) for i in range(8)]
    (base / "new.jsonl").write_text("\n".join(lines))
    return base


@pytest.fixture(autouse=True)
def _inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    sys.modules.pop("gate_mine", None)


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["check", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return code, found


RECORDS = ("small", "--against", "dense", "--data", "new.jsonl", "--max-kl", "1")
TOKENS = ("small", "--against", "dense", "--data", "data/ids.npy")
NET = ("gate_mine:small", "--against", "gate_mine:dense", "--data", "gate_mine:pairs")


def test_exit_codes_follow_the_tolerance(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, *TOKENS, "--max-loss-increase", "99%")
    assert (code, found["passed"], found["overall"]["rows"], found["overall"]["predictions"]) == (0, True, 4, 60)
    change = found["overall"]["relative"]["value"]
    assert change > 0
    ids = torch.from_numpy(np.load(work / "data/ids.npy"))
    small, dense = (math.log(perplexity(load_model(work / name)[0], [ids])) for name in ("small", "dense"))
    assert change == pytest.approx((small - dense) / dense, rel=1e-4)
    for limit, expected in ((f"{101 * change}%", 0), (f"{99 * change}%", 3), (f"{0.99 * (small - dense)}", 3)):
        assert checked(capsys, *TOKENS, "--max-loss-increase", limit)[0] == expected
    assert checked(capsys, *TOKENS, "--max-kl", "1e-6")[0] == 3
    assert checked(capsys, "dense", "--against", "dense", "--data", "data/ids.npy", "--max-kl", "1e-6")[0] == 0
    assert checked(capsys, *TOKENS, "--min-top1", "99%")[0] == 3


def test_a_bad_class_is_found_and_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*NET, "--by", "class", "--max-loss-increase", "4.0", "--out", str(tmp_path / "gate.json")]
    code, found = checked(capsys, *words)
    assert code == 3
    assert found["overall"]["verdict"] == "pass"
    assert [part["verdict"] for part in found["slices"]] == ["fail", "pass", "pass"]
    worst = found["slices"][0]
    assert (worst["name"], worst["rows"]) == ("2", 30)
    assert worst["increase"]["low"] > 4
    assert json.loads((tmp_path / "gate.json").read_text()) == found
    assert (found["format"], found["kind"]) == (1, "check")
    assert main(["check", *words, "--overwrite"]) == 3
    out = capsys.readouterr().out
    assert "FAILED: slices 2" in out
    assert "slices: 2 pass, 0 uncertain" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "gate.json"]


def test_a_field_of_records_slices(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("small", "--against", "dense", "--data", "new.jsonl", "--max-loss-increase", "900%", "--seq-len", 32)
    code, found = checked(capsys, *words, "--by", "domain", "--min-slice", 2)
    assert code == 0
    assert {part["name"] for part in found["slices"]} == {"prose", "code"}
    assert sum(part["predictions"] for part in found["slices"]) == found["overall"]["predictions"]
    code, limited = checked(capsys, *words, "--by", "domain", "--samples", 3)
    assert {part["rows"] for part in limited["slices"]} == {3}
    assert {part["verdict"] for part in limited["slices"]} == {"small"}
    assert checked(capsys, *words, "--by", "domain", "--samples", 3, "--strict")[0] == 3


def test_names_of_slices_are_shown_as_they_are(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "The gardener cuts. " * 9
    names = ["[/b]", "[red]a[/red]", "\N{GREEK SMALL LETTER LAMDA}", 3, "long" * 40]
    (work / "odd.jsonl").write_text("".join(json.dumps({"text": text, "domain": name}) + "\n" for name in names))
    words = ("small", "--against", "dense", "--data", "odd.jsonl", "--max-kl", "9", "--by", "domain")
    assert main(["check", *words]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in names[:-1]), said
    (row,) = [line for line in said.splitlines() if "longlong" in line]
    assert row.split()[-1] == "small"  # the verdict is not pushed out


def test_a_function_and_a_mapping_slice(capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, *TOKENS, "--max-kl", 99, "--by", "gate_mine:domain", "--min-slice", 2)[1]
    assert {part["name"]: part["rows"] for part in found["slices"]} == {"even": 2, "odd": 2}
    found = checked(capsys, *NET[:-1], "gate_mine:slices", "--max-kl", 99)[1]
    assert {part["name"]: part["rows"] for part in found["slices"]} == {"first": 30, "rest": 60}


def test_the_report_of_the_model_is_a_baseline(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, *TOKENS, "--baseline")
    assert code == 0
    assert found["drift"]["promised"] == pytest.approx(found["overall"]["increase"]["value"], rel=1e-4)
    alone = checked(capsys, "small", "--data", "data/ids.npy", "--baseline")
    assert alone[0] == 0
    assert alone[1]["overall"]["dense_loss"] == pytest.approx(found["overall"]["dense_loss"], rel=1e-5)
    assert alone[1]["overall"]["kl"] is None
    shutil.copytree(work / "small", work / "boasting", dirs_exist_ok=True)
    perplexity = {"dense": 10.0, "pruned": 10.1}
    (work / "boasting/report.json").write_text(json.dumps({"format": 1, "measured": {"perplexity": perplexity}}))
    code, found = checked(capsys, "boasting", *TOKENS[1:], "--baseline")
    assert (code, found["drift"]["verdict"]) == (3, "fail")
    assert main(["check", "boasting", *TOKENS[1:], "--baseline"]) == 3
    out = capsys.readouterr().out
    assert "it has drifted" in out
    assert "FAILED: the loss increase is larger than the report promised" in out


def test_an_onnx_file_is_a_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = find_function("gate_mine:small", "model", "")()
    export_onnx(small, torch.zeros(2, 4), work / "small.onnx", overwrite=True)
    code, found = checked(capsys, "small.onnx", *NET[1:], "--max-loss-increase", "1%")
    assert code == 3
    real = checked(capsys, *NET, "--max-loss-increase", "1%")[1]["overall"]
    for name in ("rows", "loss", "dense_loss", "kl", "top1"):
        assert found["overall"][name] == pytest.approx(real[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TOKENS, "nothing can fail: give a tolerance, such as --max-loss-increase 2%"),
        (("small", "--data", "data/ids.npy", "--max-kl", "1"), "give the dense model with --against"),
        (("small", "--data", "data/ids.npy", "--max-kl", "1", "--baseline"), "needs the dense model: give --against"),
        ((*TOKENS, "--max-loss-increase", "two"), "--max-loss-increase: the tolerance 'two' for loss is no number"),
        ((*TOKENS, "--max-kl", "1", "--by", "domain"), "reads a field of .jsonl or .parquet records"),
        (("small", "--against", "words", "--data", "data/ids.npy", "--max-kl", "1"), "they cannot be compared"),
        (("dense", "--data", "data/ids.npy", "--baseline"), "report.json cannot be read"),
        (("gate_mine:small", "--data", "gate_mine:pairs", "--baseline"), "reads the report.json of a folder"),
        ((*NET, "--max-kl", "1", "--by", "colour"), "batch 0 is a tuple, without columns"),
        ((*NET[:-1], "gate_mine:wrong", "--max-kl", "1"), "no input 'y', a column of batch 0"),
        ((*NET[:-1], "gate_mine:empty", "--max-kl", "1"), "slice 'first' has no rows"),
        ((*NET, "--max-kl", "1", "--min-slice", "1"), "--min-slice must be at least 2"),
        ((*NET, "--max-kl", "1", "--out", "gate.txt"), "give a file that ends with .json"),
        ((*NET, "--max-kl", "1", "--weights", "w.safetensors"), "both module:callable"),
        ((*RECORDS, "--by", "domian"), "did you mean 'domain'"),
        (("small", "--against", "dense", "--data", "self", "--max-kl", "1"), "on its own words"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(refused: Callable[..., str], words: tuple[str, ...], message: str) -> None:
    assert message in refused("check", *words)


def test_a_report_of_another_format(work: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(work / "small", work / "newer", dirs_exist_ok=True)
    (work / "newer/report.json").write_text(json.dumps({"format": 2, "measured": {}}))
    said = refused("check", "newer", "--data", "data/ids.npy", "--baseline")
    assert "no report of format 1 (it says 2)" in said
