"""``secateur prune`` from a folder to a folder: what is said, what is written, what is kept."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model, write_data
from safetensors.torch import load_file, save_file

from secateur.choose.plan import Plan
from secateur.cli import main
from secateur.cut import apply
from secateur.load.model import fingerprint, load_model

DIMS = json.dumps({"intermediate_size": 40})
EXACT = ["--dims", DIMS]
SEARCH = ["--budget", "params=94%", "--skip", "hidden", "kv_groups", "heads", "--max-depth-cut", "0", "--top-k", "2"]
SEARCH += ["--score-samples", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("prune")
    save_model(base / "dense", num_hidden_layers=1)
    save_model(base / "half", dtype=torch.bfloat16, num_hidden_layers=1)
    write_data(base / "data")
    return base


def prune(work: Path, out: Path, *words: object, model: str = "dense", data: str = "ids.npy") -> int:
    source = data if data == "self" else str(work / "data" / data)
    return main(["prune", str(work / model), "--out", str(out), "--data", source, *map(str, words)])


def report(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return found


def params(folder: Path) -> int:
    return sum(t.numel() for t in load_file(folder / "model.safetensors").values())


def test_a_budget_end_to_end(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_data = work / "data/text.txt"
    words = [*SEARCH, "--eval-data", eval_data, "--seq-len", 16, "--json", "--seed", 3]
    found = report(capsys, prune(work, tmp_path / "out", *words))
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert found == {"out": str(tmp_path / "out"), **saved}
    assert params(tmp_path / "out") == found["costs"]["params"]["pruned"] <= 0.94 * params(work / "dense")
    assert found["costs"]["params"]["dense"] == params(work / "dense")
    assert found["data"] == {"calibration": str(work / "data/ids.npy"), "evaluation": str(eval_data)}
    assert found["options"]["seed"] == 3
    assert found["options"]["top_k"] == 2
    assert found["budget"] == "params=94%"
    assert [c["chosen"] for c in found["search"]["candidates"]].count(True) == 1
    assert found["measured"]["kl"] > 0
    assert found["measured"]["perplexity"]["pruned"] != found["measured"]["perplexity"]["dense"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "plan.json", "plan.safetensors", "README.md"),
        *("report.json", "report.html", "tokenizer.json", "tokenizer_config.json"),
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_people_see_the_ranking_and_the_cost(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(work, tmp_path / "out", *SEARCH) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (" chosen", "architectures within the budget", "intermediate_size"):
        assert word in out
    assert "33,936" in out
    assert "100.0%" in out
    assert str(tmp_path / "out") in out


def test_exact_dims_and_the_plan_beside_them(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, prune(work, tmp_path / "deep/out", *EXACT, "--mend", "none", "--json"))
    assert found["sizes"]["intermediate_size"] == {"dense": 80, "pruned": 40}
    assert found["budget"] == DIMS
    assert "measured" not in found
    model, tokenizer, _ = load_model(tmp_path / "deep/out")
    assert tokenizer is not None
    plan = Plan.load(tmp_path / "deep/out")
    assert fingerprint(apply(load_model(work / "dense")[0], plan)) == fingerprint(model)
    assert plan.origin["model"] == str(work / "dense")


@pytest.mark.parametrize(("data", "rows"), [("text.txt", 29), ("text.jsonl", 88), ("self", 3)])
def test_all_kinds_of_data(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, rows: int
) -> None:
    samples = ["--samples", "3"] if data == "self" else []
    words = [*EXACT, "--seq-len", "16", "--json", *samples]
    found = report(capsys, prune(work, tmp_path / "out", *words, data=data))
    assert found["data"]["calibration"].endswith(data)
    assert found["calibration"]["samples"] == rows
    assert found["calibration"]["tokens"] == 16 * rows


def test_self_is_the_default_and_the_seed_decides_it(work: Path, tmp_path: Path) -> None:
    plans = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = [
            "prune",
            work / "dense",
            "--out",
            tmp_path / name,
            *EXACT,
            "--samples",
            2,
            "--seq-len",
            6,
            "--seed",
            seed,
        ]
        assert main([str(word) for word in words]) == 0
        plans.append(Plan.load(tmp_path / name).kept)
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_overwrite_replaces(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(work, tmp_path / "out", *EXACT) == 0
    (tmp_path / "out/mark").write_text("of the old one")
    assert prune(work, tmp_path / "out", "--dims", '{"ffn": 24}', "--overwrite") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 24
    assert not (tmp_path / "out/mark").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert capsys.readouterr().err == ""


def test_the_result_has_the_dtype_of_the_checkpoint(work: Path, tmp_path: Path) -> None:
    assert prune(work, tmp_path / "out", *EXACT, "--dtype", "float32", model="half") == 0
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    dense = load_file(work / "half/model.safetensors")["model.norm.weight"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["model.norm.weight"], dense)


def test_a_memory_budget_is_kept_by_the_result_on_disk(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The dense weights take 135,744 bytes in the checkpoint's float32, and half of it in the bfloat16 of the run.
    words = [*SEARCH[2:], "--budget", "memory=120KiB", "--kv-seq-len", 1, "--dtype", "bfloat16", "--json"]
    code = prune(work, tmp_path / "out", *words)
    if code == 2:  # saying that the two do not go together is as good
        assert "--dtype" in capsys.readouterr().err
        return
    found = report(capsys, code)
    saved = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out/model.safetensors").values())
    assert saved <= 120 * 1024
    assert found["costs"]["memory"]["pruned"] >= saved


def test_budgets_given_one_by_one_all_hold(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SEARCH[2:], "--json", "--kv-seq-len", "1"]
    code = prune(work, tmp_path / "out", "--budget", "params=90%", "--budget", "memory=95%", *words)
    out, err = capsys.readouterr()
    if code == 2:  # saying that they must stand together is as good
        assert err.startswith("error: ")
        assert "--budget" in err
        return
    assert params(tmp_path / "out") <= 0.9 * params(work / "dense")
    assert json.loads(out)["costs"]["memory"]["pruned"] <= 0.95 * json.loads(out)["costs"]["memory"]["dense"]


def test_a_sorted_model_keeps_its_first_units(work: Path, tmp_path: Path) -> None:
    assert prune(work, tmp_path / "out", *EXACT, "--presorted", "--mend", "none") == 0
    dense, pruned = (load_file(f / "model.safetensors") for f in (work / "dense", tmp_path / "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(pruned[name], dense[name][:, :40])


def test_the_cut_is_repaired_on_the_data(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(work, tmp_path / "plain", *EXACT, "--mend", "none") == 0
    assert "repaired: " not in capsys.readouterr().out
    assert prune(work, tmp_path / "out", *EXACT) == 0
    assert "repaired: 1 weights by least squares on" in capsys.readouterr().out
    plain, mended = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "out"))
    assert [n for n in plain if not torch.equal(plain[n], mended[n])] == ["model.layers.0.mlp.down_proj.weight"]
    assert prune(work, tmp_path / "no", *EXACT, "--mend", "biass") == 2
    assert "there is no repair 'biass'; did you mean 'bias'" in capsys.readouterr().err


# Scores


def test_perplexity_as_the_score(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, prune(work, tmp_path / "out", *SEARCH, "--score", "perplexity", "--json"))
    search = found["search"]
    assert (search["score"], search["higher_is_better"]) == ("perplexity", False)
    assert min(c["score"] for c in search["candidates"]) == next(
        c["score"] for c in search["candidates"] if c["chosen"]
    )


def test_choice_as_the_score(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--score", "choice", "--questions", work / "data/questions.jsonl", "--fraction", "0.5", "--json"]
    found = report(capsys, prune(work, tmp_path / "out", *SEARCH, *words))
    assert found["search"]["score"] == "choice accuracy"
    assert {c["score"] for c in found["search"]["candidates"]} <= {0.0, 0.5, 1.0}


def test_a_function_in_the_working_folder_as_the_score(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores_here.py").write_text("def narrow(model):\n    return -model.config.intermediate_size\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = report(capsys, prune(work, tmp_path / "out", *SEARCH, "--score", "scores_here:narrow", "--json"))
    candidates = found["search"]["candidates"]
    chosen = next(c for c in candidates if c["chosen"])
    assert chosen["sizes"]["intermediate_size"] == min(c["sizes"]["intermediate_size"] for c in candidates)


def test_the_cache_is_used(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SEARCH[2:], "--cache", tmp_path / "cache", "--json"]
    first = report(capsys, prune(work, tmp_path / "a", "--budget", "params=94%", *words))
    monkeypatch.setattr("secateur.methods.study.activation_scores", None)
    monkeypatch.setattr("secateur.methods.study.probe_kinds", None)
    second = report(capsys, prune(work, tmp_path / "b", "--budget", "params=90%", *words))
    assert second["costs"]["params"]["pruned"] < first["costs"]["params"]["pruned"]
    assert first["search"]["probes"] == second["search"]["probes"]


# Ctrl-C


@pytest.mark.parametrize(
    "step",
    ["secateur.methods.verbs.apply", "secateur.ship.checkpoint._save_model", "secateur.choose.plan.write_shard"],
)
def test_ctrl_c_leaves_nothing(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, stop)
    assert prune(work, tmp_path / "deep/out", *EXACT) == 130
    assert capsys.readouterr() == ("", "stopped; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_our_fault_leaves_nothing(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("secateur.ship.checkpoint._save_tokenizer", fail)
    assert prune(work, tmp_path / "deep/out", *EXACT) == 1
    assert "our fault" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_a_place_are_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(work / "dense", tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    save_file({**load_file(weights), "model.extra.weight": torch.zeros(3)}, weights, metadata={"format": "pt"})
    words = ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--data", str(work / "data/ids.npy")]
    assert main([*words, *EXACT]) == 0
    assert "left out: 1 tensors of the checkpoint" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["unused_tensors"] == ["model.extra.weight"]
