"""``secateur prune --stream``: the result of a run in memory, from the files; stopped, gone on, refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli_models import save_model, write_data
from safetensors.torch import load_file, save_file

from secateur.choose.budget import Budget
from secateur.cli import main, streaming
from secateur.errors import SecateurError
from secateur.load.model import find_source, fingerprint, load_model
from secateur.load.shards import write_shard
from secateur.load.store import store_of
from secateur.load.streamed import load_streamed
from secateur.methods import METHODS
from secateur.methods.streaming import STREAMS, check_streams, file_system, needs

METHOD_WORDS: dict[str, list[str]] = {
    "wanda": ["--budget", "sparsity=50%"],
    "sparsegpt": ["--budget", "n:m=2:4"],
    "alps": ["--budget", "sparsity=50%"],
    "magnitude": ["--budget", "sparsity=50%", "--scope", "global"],
    "minitron": ["--budget", "params=85%", "--no-measure"],
    "depth": ["--budget", "params=80%"],
    "flap": ["--budget", "params=85%"],
    "obs": ["--budget", "params=85%", "--no-gradients"],
}
WANDA = ["--method", "wanda", *METHOD_WORDS["wanda"]]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("stream")
    save_model(base / "dense", num_hidden_layers=3)
    save_model(base / "half", dtype=torch.bfloat16, num_hidden_layers=2, tokenizer=False)
    write_data(base / "data")
    return base


@pytest.fixture
def prune(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*words: object, model: object = "dense", out: str = "out", data: object = "ids.npy") -> Ran:
        given = ["--data", str(work / "data" / str(data))] if data is not None else []
        code = main(["prune", str(work / str(model)), "--out", str(tmp_path / out), *given, *map(str, words)])
        return Ran(code, *capsys.readouterr())

    return run


def result(folder: Path) -> tuple[str, dict[str, Any]]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return fingerprint(load_model(folder)[0]), report


def test_every_method_that_streams_is_tried_here() -> None:
    assert set(STREAMS) == set(METHODS)
    assert {name for name, why in STREAMS.items() if why is None} == set(METHOD_WORDS)


@pytest.mark.parametrize("method", METHOD_WORDS)
def test_the_result_is_that_of_a_run_in_memory(prune: Callable[..., Ran], tmp_path: Path, method: str) -> None:
    words = ["--method", method, *METHOD_WORDS[method]]
    assert prune(*words, out="memory")[::2] == (0, "")
    ran = prune(*words, "--stream", "--max-memory", "100GiB", "--json")
    assert ran.code == 0
    assert ran.err.count("\n") == 1
    assert "streamed from" in ran.err
    (one, before), (other, after) = result(tmp_path / "memory"), result(tmp_path / "out")
    assert one == other
    plans = [load_file(tmp_path / name / "plan.safetensors") for name in ("memory", "out")]
    assert list(plans[0]) == list(plans[1])
    assert all(torch.equal(plans[0][name], plans[1][name]) for name in plans[0])
    told = after.pop("streamed")
    assert set(before) == set(after)
    same = set(before) - {"made", "seconds", "mend"}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    assert json.loads(ran.out)["streamed"] == told
    assert told["blocks"] == 3
    assert told["bytes_read"] > 0
    assert told["peak_memory"] > 10**8
    assert told["max_memory"] == 100 * 2**30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "out"]
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


def test_the_result_keeps_the_type_of_the_checkpoint(prune: Callable[..., Ran], tmp_path: Path) -> None:
    words = ["--method", "sparsegpt", *METHOD_WORDS["sparsegpt"], "--dtype", "float32"]
    assert prune(*words, model="half", out="memory").code == 0
    assert prune(*words, "--stream", model="half").code == 0
    assert result(tmp_path / "out")[0] == result(tmp_path / "memory")[0]
    model, _, _ = load_model(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_so_does_that_of_a_run_that_was_stopped_while_it_saved(
    prune: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method", "sparsegpt", *METHOD_WORDS["sparsegpt"], "--dtype", "float32"]
    assert prune(*words, model="half", out="memory").code == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.cli.saving.add_page", stop)
    assert prune(*words, "--stream", model="half").code == 130
    monkeypatch.undo()
    assert prune(*words, "--stream", model="half").code == 0
    assert result(tmp_path / "out")[0] == result(tmp_path / "memory")[0]


# --- stopped and gone on ---


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop a run as if by Ctrl-C where it writes for the so-and-so-many-th time."""
    write, calls = write_shard, []

    def stopping(*args: Any, **options: Any) -> int:
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(sys.modules["secateur.load.store"], "write_shard", stopping)


@pytest.fixture
def stopped(prune: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped in its second block."""
    stop_at(monkeypatch, 2)
    ran = prune(*WANDA, "--stream")
    monkeypatch.undo()
    folder = tmp_path / "out.streaming"
    assert ran.code == 130
    assert f"what is finished is in {folder}: give the same command again" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.streaming"]
    return folder


def test_the_same_command_goes_on(
    prune: Callable[..., Ran], stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(path for path in stopped.rglob("unit-*.safetensors")).stat().st_ino
    partial = tmp_path / ".out.partial-99999999"  # of a run that was killed while it saved
    partial.mkdir()
    written: list[str] = []

    def noting(path: Path, *arguments: Any, **options: Any) -> int:
        written.append(path.name)
        return write_shard(path, *arguments, **options)

    monkeypatch.setattr(sys.modules["secateur.load.store"], "write_shard", noting)
    ran = prune(*WANDA)  # it is streamed without being told so, because it was
    assert ran.code == 0
    assert "an unfinished run is there" in ran.err
    assert "unit-00001.safetensors" not in written
    assert first in {path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert prune(*WANDA, out="memory").code == 0
    assert result(tmp_path / "out")[0] == result(tmp_path / "memory")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "wanda", "--budget", "sparsity=40%"], ("budget has changed", "sparsity=50%", "sparsity=40%")),
        (["--method", "sparsegpt", "--budget", "sparsity=50%"], ("method has changed", "wanda", "sparsegpt")),
        ([*WANDA, "--scope", "tensor"], ("scope has changed", "row", "tensor")),
        ([*WANDA, "--seed", "4"], ("seed has changed", "0", "4")),
        ([*WANDA, "--dtype", "bfloat16"], ("dtype has changed", "None", "bfloat16")),
        ([*WANDA, "--batch-size", "2"], ("calibration data has changed",)),
        ([*WANDA, "--samples", "3"], ("calibration data has changed",)),
    ],
)
def test_another_command_does_not(
    prune: Callable[..., Ran], stopped: Path, words: list[str], said: tuple[str, ...]
) -> None:
    there = sorted(stopped.rglob("*"))
    ran = prune(*words, "--stream")
    assert (ran.code, ran.out) == (2, "")
    for text in (*said, str(stopped), "--restart"):
        assert text in ran.err
    assert sorted(stopped.rglob("*")) == there


def test_another_number_of_threads_does_not(prune: Callable[..., Ran], stopped: Path) -> None:
    torch.set_num_threads(2)
    ran = prune(*WANDA, "--stream")
    assert "number of threads has changed: it was 1, and is now 2" in ran.err


def test_a_run_is_begun_anew(prune: Callable[..., Ran], stopped: Path, tmp_path: Path) -> None:
    words = ["--method", "wanda", "--budget", "sparsity=40%"]
    assert prune(*words, "--stream", "--restart").code == 0
    assert prune(*words, out="memory").code == 0
    assert result(tmp_path / "out")[0] == result(tmp_path / "memory")[0]
    assert not stopped.exists()


@pytest.mark.parametrize("part", ["weights", "header", "config"])
def test_a_checkpoint_that_changed_is_not_gone_on_with(
    prune: Callable[..., Ran], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = Path(shutil.copytree(work / "dense", tmp_path / "model"))
    stop_at(monkeypatch, 2)
    assert prune(*WANDA, "--stream", model=folder).code == 130
    monkeypatch.undo()
    path = folder / ("config.json" if part == "config" else "model.safetensors")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if part == "config":
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        tensors = load_file(path)
        metadata = {"format": "pt" if part == "weights" else "tp"}
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    if part == "header":
        os.utime(path, ns=times)  # size and time are those of before
    ran = prune(*WANDA, "--stream", model=folder)
    assert ran.code == 2
    assert f"file {path.name} has changed: it was " in ran.err
    assert "--restart" in ran.err


def test_a_damaged_record_is_told(prune: Callable[..., Ran], stopped: Path) -> None:
    (stopped / "run.json").unlink()
    for restart in ([], ["--restart"]):  # it may be somebody else's
        assert f"{stopped}: is in the way" in prune(*WANDA, "--stream", *restart).err
    (stopped / "run.json").write_text("[]")
    assert "is no record of a run; begin anew with --restart" in prune(*WANDA, "--stream").err
    assert prune(*WANDA, "--stream", "--restart").code == 0


def test_a_bad_budget_leaves_nothing(prune: Callable[..., Ran], tmp_path: Path) -> None:
    ran = prune("--method", "wanda", "--budget", "params=50%", "--stream")
    assert (ran.code, ran.out) == (2, "")
    assert "error: " in ran.err
    assert list(tmp_path.iterdir()) == []


# --- when a model is streamed ---


def test_a_model_too_large_for_memory_is_streamed(
    prune: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "_resident", lambda: 0)
    monkeypatch.setattr(streaming, "_PROGRAM", 0)
    monkeypatch.setattr(streaming, "available", lambda _: 400_000)
    monkeypatch.setattr(streaming, "_TIMES", 1)
    ran = prune(*WANDA, "--json")
    assert "streamed" not in json.loads(ran.out)
    monkeypatch.setattr(streaming, "_TIMES", 3)
    words = [*WANDA, "--overwrite", "--json", "--seq-len", "4", "--batch-size", "1"]
    ran = prune(*words)
    assert ran.code == 0, ran.err
    assert "3 times the weights (" in ran.err
    assert "exceed the 390.62 KiB of memory that may be used: the weights stay in their files" in ran.err
    assert json.loads(ran.out)["streamed"]["max_memory"] is None
    for more in (["--no-stream"], ["--max-memory", "1GiB"]):
        ran = prune(*words, *more)
        assert (ran.code, ran.err) == (0, "")
        assert "streamed" not in json.loads(ran.out)


def test_what_cannot_be_streamed_is_loaded_and_said(prune: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "available", lambda _: 1 - streaming._resident())
    ran = prune("--method", "gradnas", "--budget", "params=85%", "--json")
    assert ran.code == 0, ran.err
    assert "but the run cannot be streamed, so the model is loaded whole: gradnas needs the model in memory" in ran.err
    assert "streamed" not in json.loads(ran.out)


# --- refused ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "gradnas", "--budget", "params=85%"], "gradnas needs the model in memory: it takes gradients"),
        (["--method", "search", "--budget", "params=85%"], "search needs the model in memory"),
        (["--method", "structural", "--budget", "params=85%"], "structural needs the model in memory"),
        (["--method", "fastnas", "--budget", "params=85%"], "fastnas needs the model in memory"),
        (["--method", "obs", "--budget", "params=85%"], "--no-gradients"),
        (["--budget", "params=85%"], "--no-measure"),
        (["--dims", '{"num_hidden_layers": 2}'], "minitron measures dropped layers (num_hidden_layers)"),
        ([*WANDA, "--keep-scores"], "--keep-scores needs the model in memory"),
        ([*WANDA, "--allocation", "owl"], "allocation owl looks at the whole model"),
        ([*WANDA, "--adapt-batch-norm"], "--adapt-batch-norm needs the model in memory"),
        (["--budget", "params=85%", "--no-measure", "--score", "perplexity"], "--score needs the model in memory"),
        ([*WANDA, "--no-stream"], "--stream and --no-stream contradict each other"),
        ([*WANDA, "--device", "cuda"], "to go to --device cuda, and models are streamed on the cpu only, for now"),
        ([*WANDA, "--max-memory", "1KiB"], "--max-memory gives 1.00 KiB"),
        ([*WANDA, "--max-memory", "50%"], "--max-memory 50%: must be a number of bytes, such as 6GiB"),
        ([*WANDA, "--max-memory", "lots"], "--max-memory lots: 'lots' is not a positive number with a unit"),
    ],
)
def test_refused(prune: Callable[..., Ran], tmp_path: Path, words: list[str], said: str) -> None:
    ran = prune(*words, "--stream")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert said in ran.err
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_streamed_run_need_one(prune: Callable[..., Ran]) -> None:
    assert "--restart is for a streamed run, and this one is not: add --stream" in prune(*WANDA, "--restart").err
    assert "--no-stream says it: give one" in prune(*WANDA, "--no-stream", "--max-memory", "1GiB").err


def test_data_that_the_model_writes_itself(prune: Callable[..., Ran]) -> None:
    ran = prune("--dims", '{"intermediate_size": 40}', "--stream", data=None)
    assert "data self is written by the model, which reads all weights for every token" in ran.err


def test_a_model_of_a_function(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "out"), "--method", "magnitude", "--budget", "sparsity=50%", "--stream"]
    assert main(["prune", "small_nets:mlp", *words]) == 2
    assert "small_nets:mlp is built by a function" in capsys.readouterr().err


def test_too_little_memory_names_what_would_do(prune: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_resident", lambda: 2**20)
    words = ["--method", "sparsegpt", "--budget", "sparsity=50%", "--stream"]
    ran = prune(*words, "--max-memory", "1.1MiB")
    assert ran.code == 2
    for part in ("weights of model.layers.0", "matrices of 80 columns", "a batch", "--max-memory gives 1.10 MiB"):
        assert part in ran.err
    least = ran.err.split("this run needs ")[1].split(" of memory")[0]
    number, unit = least.split()
    assert prune(*words, "--max-memory", f"{float(number) - 0.01}{unit}").code == 2
    assert prune(*words, "--max-memory", f"{float(number) + 0.01}{unit}").code == 0


def test_too_little_disk_is_said_before_the_start(
    prune: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ran = prune(*WANDA, "--stream")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    for part in (f"on the file system {file_system(tmp_path)}", "195.31 KiB are free", "result ", "activations "):
        assert part in ran.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_the_disk_already_is_not_needed_again(
    prune: Callable[..., Ran], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sum(path.stat().st_size for path in stopped.rglob("*") if path.is_file())
    monkeypatch.setattr(streaming, "_tell", lambda _: None)
    usage = shutil.disk_usage(stopped)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = prune(*WANDA, "--stream").err.split("this run needs up to ")[1].split(" more")[0]
    (stopped / "more").write_bytes(bytes(102_400))
    less = prune(*WANDA, "--stream").err.split("this run needs up to ")[1].split(" more")[0]
    assert there > 0
    assert float(said.split()[0]) - float(less.split()[0]) == pytest.approx(100, abs=0.02)


def test_needs_are_what_the_run_takes(work: Path, tmp_path: Path) -> None:
    model, _, source = load_streamed(work / "dense", work=tmp_path / "work")
    store = store_of(model)
    assert store is not None
    rows = [torch.zeros(4, 16, dtype=torch.int64)] * 2
    weights = sum(p.nbytes for p in model.parameters())
    found = needs(model, store, source, Budget.parse("params=60%"), "obs", rows)
    assert found.disk == {"result": round(0.6 * weights), "activations": round(2.5 * 128 * 48 * 4)}
    block = sum(p.nbytes for p in model.get_submodule("model.layers.0").parameters())
    assert found.memory["weights of model.layers.0"] == 2 * block
    assert found.memory["matrices of 80 columns"] == 4 * 80 * 80 * 8
    assert found.all_memory == round(1.05 * sum(found.memory.values()))
    masks = needs(model, store, source, Budget.parse("sparsity=60%"), "wanda", rows)
    assert masks.disk["result"] == weights
    assert masks.disk["masks"] == weights // 4 // 8
    assert "matrices of 80 columns" not in masks.memory
    half = needs(model, store, find_source(work / "half"), Budget.parse("sparsity=60%"), "wanda", rows)
    assert half.disk["result in the form of its checkpoint"] == weights // 2


# --- checkpoints that are not whole ---


def spoilt(work: Path, folder: Path, how: str) -> Path:
    """A copy of the model in two shards, spoilt in one way."""
    shutil.copytree(work / "dense", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    if how == "nan":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    second = folder / "model-00002-of-00002.safetensors"
    if how == "missing":
        second.unlink()
    elif how == "short":
        second.write_bytes(second.read_bytes()[:-1])
    elif how == "header":
        second.write_bytes(second.read_bytes()[:8] + b"x" + second.read_bytes()[9:])
    elif how == "wrong":
        where[names[0]] = second.name
    elif how == "lacks":
        del tensors[names[-1]]
        save_file({n: tensors[n] for n in names[9:-1]}, second, metadata={"format": "pt"})
        del where[names[-1]]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "1 of the 2 weight files that model.safetensors.index.json names are missing: model-00002-of"),
        ("short", "model-00002-of-00002.safetensors: cut short: it must have"),
        ("header", "model-00002-of-00002.safetensors: no safetensors file: its header is damaged"),
        ("wrong", "says that model.embed_tokens.weight is in model-00002-of-00002.safetensors, but it is not"),
        ("lacks", "the weight files lack 1 tensors of the model, such as model.norm.weight"),
        ("nan", "NaN in the weights: model.layers.1.mlp.up_proj.weight (1 of 3,840 values are bad)"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    prune: Callable[..., Ran], work: Path, tmp_path: Path, how: str, said: str
) -> None:
    ran = prune(*WANDA, "--stream", model=spoilt(work, tmp_path / "model", how))
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the table of methods ---


def test_other_ways_of_the_same_methods_stream() -> None:
    half, dims = Budget.parse("params=50%"), Budget.parse(dims={"hidden_size": 32})
    check_streams("minitron", {}, dims)
    check_streams("minitron", {"measure": False}, half)
    check_streams("minitron", {"measure": False}, Budget.parse(dims={"n_layer": 2}))
    check_streams("obs", {"gradients": False}, half)
    check_streams("wanda", {"allocation": {"*": 0.5}, "keep_scores": False}, Budget.parse("sparsity=50%"))
    with pytest.raises(SecateurError, match="there is no method 'wands'; did you mean 'wanda'"):
        check_streams("wands", {}, half)
    with pytest.raises(SecateurError, match="minitron measures candidates of a budget"):
        check_streams("minitron", {"measure": True}, half)
