"""``secateur report`` and ``compare``, and the page that prune, distill and run leave beside a result."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_models import save_model, write_data

from secateur.cli import main

CUT = ("--dims", '{"intermediate_size": 40}', "--data", "data/ids.npy")
MASK = ("--method", "magnitude", "--budget", "sparsity=50%")
SEARCH = ("--budget", "params=94%", "--skip", "hidden", "kv_groups", "heads", "--max-depth-cut", "0", "--top-k", "2")
RECIPE = """\
model: dense
data: data/ids.npy
eval_data: data/text.txt
out: out/recipe
steps:
  - prune: {budget: {intermediate_size: 40}, seq_len: 16}
  - distill: {data: data/text.txt, steps: 4, eval_every: 1, seq_len: 16, batch_size: 2}
  - evaluate: {seq_len: 16}
  - report: {}
"""
NET = """\
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
"""
Say = Callable[..., str]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data."""
    place = tmp_path_factory.mktemp("report")
    save_model(place / "dense", num_hidden_layers=1)
    write_data(place / "data")
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def work(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with them, in which the user stands."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_cut_leaves_a_page_that_report_makes_again(work: Path, say: Say) -> None:
    words = ("prune", "dense", "--out", "out/cut", *SEARCH, "--score-samples", 2, "--data", "data/ids.npy")
    told = say(*words, "--eval-data", "data/text.txt", "--seq-len", 16)
    assert told.endswith("\nreport: out/cut/report.html\n")
    html = (work / "out/cut/report.html").read_text()
    report = json.loads((work / "out/cut/report.json").read_text())
    command = report["made"]["command"]
    assert (report["format"], command[:5]) == (1, ["secateur", "prune", "dense", "--out", "out/cut"])
    assert command[-1] == "16"
    assert {"secateur", "torch", "transformers", "python", "platform"} <= report["made"]["versions"].keys()
    assert report["bytes"] == {"dense": (work / "dense/model.safetensors").stat().st_size}
    assert [row["name"] for row in report["where"]] == ["model.layers.0"]
    ffn = report["where"][0]["axes"]["ffn"]
    assert (ffn["dense"], ffn["pruned"]) == (80, report["sizes"]["intermediate_size"]["pruned"])
    for shown in ("out/cut", "Before and after", "What was cut where", "What the search saw", "perplexity", "<svg"):
        assert shown in html
    assert ".partial" not in html
    assert [p.name for p in (work / "out").iterdir()] == ["cut"]
    (work / "out/cut/report.html").unlink()
    assert say("report", "out/cut") == "report: out/cut/report.html\n"
    assert (work / "out/cut/report.html").read_text() == html
    assert say("report", "out/cut", "--out", "page.html") == "report: page.html\n"
    assert Path("page.html").read_text() == html


def test_parameters_of_layers_add_up(work: Path, say: Say) -> None:
    say("prune", "dense", "--out", "out/cut", *CUT, "--mend", "none")
    report = json.loads((work / "out/cut/report.json").read_text())
    lost = {key: sum(row["params"][key] for row in report["where"]) for key in ("dense", "pruned")}
    both = report["costs"]["params"]
    assert lost["dense"] - lost["pruned"] == both["dense"] - both["pruned"] == 3 * 48 * 40


def test_masks_and_a_constructor(work: Path, say: Say) -> None:
    assert "report: out/masks/report.html" in say("prune", "dense", "--out", "out/masks", *MASK)
    html = (work / "out/masks/report.html").read_text()
    assert "Zeros of each tensor" in html
    assert "Zeros make nothing faster" in html
    assert "<svg" not in html
    (work / "reported_net.py").write_text(NET)
    words = ("--method", "structural", "--budget", "params=80%", "--input-shape", "2,3,6,6")
    say("prune", "reported_net:net", "--out", "out/net", *words)
    html = (work / "out/net/report.html").read_text()
    assert "memory of the weights" in html  # it has no cache of keys and values
    report = json.loads((work / "out/net/report.json").read_text())
    assert report["bytes"] == {"dense": report["costs"]["memory"]["dense"]}
    assert [list(row["axes"]) for row in report["where"]] == [["channels"]]


def test_a_recipe_and_a_distillation(work: Path, say: Say) -> None:
    told = say("run", "recipe.yaml")
    assert told.endswith("report: out/recipe/report.html\n")
    html = (work / "out/recipe/report.html").read_text()
    for shown in ("1. prune", "2. distill", "3. evaluate", "4. report", "Healing", "secateur</span> <span>run", "<svg"):
        assert shown in html
    report = json.loads((work / "out/recipe/report.json").read_text())
    assert report["made"]["command"] == ["secateur", "run", "recipe.yaml"]
    assert "made" not in report["steps"][0]
    assert report["steps"][0]["where"][0]["axes"]["ffn"] == {"dense": 80, "pruned": 40}
    before = html
    assert say("report", "out/recipe") == "report: out/recipe/report.html\n"
    assert (work / "out/recipe/report.html").read_text() == before
    words = (
        "distill",
        "--teacher",
        "dense",
        "--student",
        "out/recipe",
        "--out",
        "out/healed",
        "--data",
        "data/text.txt",
    )
    told = say(*words, "--steps", 2, "--seq-len", 16, "--eval-data", "data/text.txt")
    assert told.endswith("report: out/healed/report.html\n")
    assert "Healing" in (work / "out/healed/report.html").read_text()
    assert say("compare", "out/recipe", "out/healed", "--out", "both.html") == "report: both.html\n"
    text = Path("both.html").read_text()
    assert "2 ways to prune dense" in text
    assert "different dense models" not in text


def test_without_the_extra_a_result_is_whole_and_says_so(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["prune", "dense", "--out", "out/masks", *MASK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    last = out.splitlines()[-1]
    assert last.startswith("report.html was not written (the report is made with jinja2, which is missing: pip install")
    assert last.endswith("secateur report out/masks")
    assert (work / "out/masks/model.safetensors").is_file()
    assert not (work / "out/masks/report.html").exists()
    assert main(["prune", "dense", "--out", "out/more", *MASK, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["out"] == "out/more"
    assert err.startswith("report.html was not written (")
    assert main(["report", "out/masks"]) == 2
    assert "pip install 'secateur[report]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert main(["report", "out/masks"]) == 0
    assert (work / "out/masks/report.html").is_file()


def test_what_is_refused(work: Path, say: Say, refused: Callable[..., str]) -> None:
    say("prune", "dense", "--out", "out/masks", *MASK)
    assert "no report.json is in it, so it is no run; these are: out/masks" in refused("report", "out")
    assert "no such folder" in refused("report", "nowhere")
    say("report", "out/masks", "--out", "page.html")
    assert "exists already" in refused("report", "out/masks", "--out", "page.html")
    say("report", "out/masks", "--out", "page.html", "--overwrite")
    Path("mine.html").write_text("<p>mine</p>")
    assert "no page of secateur" in refused("report", "out/masks", "--out", "mine.html", "--overwrite")
    assert "no page of secateur" in refused("compare", "out/masks", "dense", "--out", "mine.html", "--overwrite")
    assert "dense: no report.json is in it" in refused("compare", "out/masks", "dense", "--out", "new.html")
    assert "two runs or more" in refused("compare", "out/masks", "--out", "new.html")
    assert "given twice" in refused("compare", "out/masks", "out/masks/", "--out", "new.html")
    report = json.loads((work / "out/masks/report.json").read_text())
    (work / "out/masks/report.json").write_text(json.dumps(report | {"format": 2, "secateur": "2.0"}))
    said = refused("report", "out/masks")
    assert "written by secateur 2.0, format 2; this version reads format 1" in said
    assert not Path("new.html").exists()
