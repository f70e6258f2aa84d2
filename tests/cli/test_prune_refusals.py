"""Every bad input of ``secateur prune``: one line, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_models import save_model, write_data
from safetensors.torch import load_file, save_file

from secateur.cli import main

EXACT = ["--dims", '{"intermediate_size": 40}']
BUDGET = ["--budget", "params=70%"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("refusals")
    save_model(base / "dense", num_hidden_layers=1)
    save_model(base / "gpt2", "gpt2", tokenizer=False)
    write_data(base / "data")
    (base / "data/empty.txt").touch()
    (base / "data/empty.jsonl").touch()
    (base / "data/blank.txt").write_text("\n")
    (base / "data/short.txt").write_text("a few words")
    (base / "data/torn.jsonl").write_text('{"text": "whole"}\n{"text": "to')
    (base / "data/words.pdf").write_text("x")
    np.save(base / "data/large.npy", np.full((2, 16), 999))
    np.save(base / "data/none.npy", np.zeros((0, 16), dtype=np.int64))
    (base / "nothing").mkdir()
    (base / "afile").write_text("x")
    broken(base)
    return base


def broken(base: Path) -> None:
    """Copies of the model, each spoilt in its own way."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base / "dense", base / name))

    def spoil(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = copy(name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    (copy("weightless") / "model.safetensors").unlink()
    path = copy("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    shard = copy("shards")
    (shard / "model.safetensors").unlink()
    save_model(shard, tokenizer=False, num_hidden_layers=1)
    tensors = load_file(shard / "model.safetensors")
    names = sorted(tensors)
    where: dict[str, str] = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, shard / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (shard / "model.safetensors").unlink()
    (shard / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    second = shard / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])

    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")

    def infinite(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("inf")

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1e38)

    spoil("nan", nan)
    spoil("inf", infinite)
    spoil("overflow", overflow)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if "__pycache__" not in str(p)}


@pytest.fixture
def refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run it from the folder with everything in it; the error line, once all is known to be as it was."""
    monkeypatch.chdir(work)

    def run(*words: str, model: str = "dense", data: str | None = "data/ids.npy", out: str | None = None) -> str:
        target = out or str(tmp_path / "deep/out")
        before = tree(work), tree(tmp_path)
        given = [] if data is None else ["--data", data]
        code = main(["prune", model, "--out", target, *given, *words])
        found = capsys.readouterr()
        assert code == 2, found.err
        assert found.out == ""
        assert found.err.startswith("error: "), found.err
        assert found.err.count("\n") == 1, found.err
        assert (tree(work), tree(tmp_path)) == before
        return found.err.removeprefix("error: ").rstrip("\n")

    return run


def dims(**sizes: int) -> list[str]:
    return ["--dims", json.dumps(sizes)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dims(hiden_size=24), "dims: the config has no size 'hiden_size'; did you mean 'hidden_size'?"),
        (dims(hidden_size=64), "dims: hidden_size=64 is above the current size of 48"),
        (dims(num_attention_heads=3), "dims: 3 heads are not divisible by 2 KV groups"),
        (dims(hidden_size=47), "4 heads do not divide a hidden size of 47"),
        (dims(hidden_size=0), "dims: hidden_size must be a whole number of at least 1, not 0"),
        (["--dims", "{"], "is not JSON"),
        (["--dims", "{}"], "dims must be a JSON object"),
        (["--dims", "[1]"], "dims must be a JSON object"),
        (["--dims", '{"ffn": 40.5}'], "ffn must be a whole number"),
        ([*EXACT, *BUDGET], "give either --budget, such as params=70%, or exact --dims"),
        ([], "give either --budget, such as params=70%, or exact --dims"),
        (["--budget"], "give either --budget, such as params=70%, or exact --dims"),
        (["--budget", "params=10%"], "the smallest reachable is"),
        (["--budget", "params=0"], "must be above 0"),
        (["--budget", "params=120%"], "at most 100%"),
        (["--budget", "params"], "is not of the form MEASURE=LIMIT"),
        (["--budget", "params=8GiB"], "unknown unit 'GiB'; known for params"),
        (["--budget", "memory=8GX"], "unknown unit 'GX'; known for memory"),
        (["--budget", "parms=70%"], "unknown budget measure 'parms'; did you mean 'params'?"),
        (["--budget", "params=70%", "params=60%"], "budget params is given twice"),
        (["--budget", "latency=5ms"], "a budget of latency is not served by minitron"),
        ([*BUDGET, "--skip", "hiden"], "skip: there is no kind 'hiden'; did you mean 'hidden'?"),
        ([*BUDGET, "--divisors", "fnn", "8"], "divisors: there is no kind 'fnn'; did you mean 'ffn'?"),
        ([*BUDGET, "--top-k", "0"], "top_k must be at least 1, not 0"),
        ([*BUDGET, "--max-width-cut", "1.5"], "max_width_cut must be at least 0 and below 1, not 1.5"),
        ([*BUDGET, "--method", "minitrom"], "--method: there is no method 'minitrom'; did you mean 'minitron'?"),
        ([*BUDGET, "--score", "perplexitty"], "there is no score 'perplexitty'; did you mean 'perplexity'?"),
        ([*BUDGET, "--score", "no_such_module:f"], "no module 'no_such_module'"),
        ([*BUDGET, "--score", "json:dumpz"], "module 'json' has no 'dumpz'; did you mean 'dump'?"),
        ([*BUDGET, "--score", "choice"], "--score choice needs --questions"),
        ([*BUDGET, "--questions", "data/questions.jsonl"], "go with --score choice, not kl"),
        ([*BUDGET, "--shots", "2"], "go with --score choice, not kl"),
        ([*BUDGET, "--score", "choice", "--questions", "data/question.jsonl"], "did you mean 'questions.jsonl'?"),
        ([*BUDGET, "--score", "choice", "--questions", "data/questions.jsonl", "--fraction", "0"], "fraction must be"),
        ([*EXACT, "--score", "perplexity"], "has no use with exact --dims"),
        ([*EXACT, "--dtype", "flot32"], "dtype 'flot32' is unknown; did you mean"),
        ([*EXACT, "--device", "gpu"], "device 'gpu'"),
        ([*EXACT, "--samples", "-1"], "samples must be at least 1, not -1"),
        ([*EXACT, "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        ([*EXACT, "--seq-len", "999"], "seq_len 999 is longer than the 256 positions"),
        ([*EXACT, "--eval-data", "data/nowhere.npy"], "nowhere.npy: no such file"),
        ([*EXACT, "--eval-data", "self"], "self"),
        ([*EXACT, "--cache", "afile"], "afile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_options(refused: Callable[..., str], words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_the_smallest_reachable_can_be_reached(
    refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--skip", "hidden", "heads", "kv_groups", "--max-depth-cut", "0", "--top-k", "1", "--score-samples", "1"]
    text = refused("--budget", "params=50%", *some)
    floor = int(text.split("the smallest reachable is ")[1].split(" ")[0].replace(",", ""))
    words = ["prune", "dense", "--data", "data/ids.npy", "--out", str(tmp_path / "out"), *some, "--json", "--budget"]
    assert main([*words, f"params={floor}"]) == 0
    assert json.loads(capsys.readouterr().out)["costs"]["params"]["pruned"] == floor
    assert f"the smallest reachable is {floor:,} " in refused("--budget", f"params={floor - 1}", *some)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data/empty.txt", "empty.txt: the file is empty"),
        ("data/empty.jsonl", "empty.jsonl: the file is empty"),
        ("data/none.npy", "none.npy: the array is empty"),
        ("data/blank.txt", "too few for one row"),
        ("data/short.txt", "tokens are too few for one row of 256"),
        ("data/nowhere.txt", "nowhere.txt: no such file"),
        ("data/torn.jsonl", "torn.jsonl line 2: invalid JSON"),
        ("data/words.pdf", "unknown ending '.pdf'"),
        ("data/large.npy", "token id 999 is outside the model's vocabulary of 320"),
        ("nothing", "nothing: no .jsonl, .npy, .parquet, .txt file in this folder"),
    ],
)
def test_data(refused: Callable[..., str], data: str, message: str) -> None:
    assert message in refused(*EXACT, data=data)


def test_text_without_a_tokenizer(refused: Callable[..., str]) -> None:
    assert "text needs the model's tokenizer" in refused(*dims(n_inner=40), model="gpt2", data="data/text.txt")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("weightless", "weightless: no weights: neither model.safetensors nor model.safetensors.index.json"),
        ("truncated", "model.safetensors: cut short: it must have"),
        ("shards", "model-00002-of-00002.safetensors: cut short"),
        ("nan", "nan: NaN in the weights: model.layers.0.mlp.up_proj.weight (1 of 3,840 values are bad)"),
        ("inf", "inf: infinity in the weights: model.norm.weight (1 of 48 values are bad)"),
        ("densse", "densse: no such model folder; did you mean 'dense'?"),
        ("nothing", "nothing: no config.json, so this is no transformers model"),
        ("afile", "afile: a model is a folder, and this is a file"),
    ],
)
@pytest.mark.parametrize("words", [EXACT, BUDGET], ids=["dims", "budget"])
def test_models(refused: Callable[..., str], model: str, message: str, words: list[str]) -> None:
    assert message in refused(*words, model=model)


@pytest.mark.parametrize("data", ["data/ids.npy", "self"])
def test_activations_that_overflow(refused: Callable[..., str], data: str) -> None:
    text = refused(*EXACT, "--samples", "2", "--seq-len", "8", model="overflow", data=data)
    assert "not finite" in text or "NaN or infinite activations at the input of model.layers.0.mlp.down_proj" in text


def test_gpt2_names_its_rule(refused: Callable[..., str]) -> None:
    text = refused(*dims(n_embd=36), model="gpt2", data="data/ids.npy")
    assert "GPT2Config cannot describe" in text
    assert "with a fixed head dimension of 12, hidden must be 12 x heads" in text


# --out


def test_an_existing_result_stays(refused: Callable[..., str], work: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(work / "dense", old)
    assert "exists already; choose another name, or overwrite it" in refused(*EXACT, out=str(old))
    (tmp_path / "file").write_text("x")
    assert "is a file, and a result is a folder" in refused(*EXACT, out=str(tmp_path / "file"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("do not delete")
    assert "it is no result" in refused(*EXACT, "--overwrite", out=str(tmp_path / "mine"))
    assert "holds the model that is being pruned" in refused(*EXACT, "--overwrite", out="dense")
    # The old result also outlives a run that fails later.
    assert "is above the current size" in refused(*dims(ffn=99), "--overwrite", out=str(old))


def test_out_is_checked_before_the_model_is_loaded(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secateur.cli.prune.open_model", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert "exists already" in refused(*EXACT, out=str(tmp_path / "full"))
    assert "no such file" in refused(*EXACT, data="data/nowhere.txt")
    assert "no score" in refused(*BUDGET, "--score", "klx")
