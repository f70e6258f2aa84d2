"""The bundled model is what its README says, and its training script runs."""

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

MODEL = Path(__file__).resolve().parents[1] / "examples/models/pydoc-llama"
# One thread: on a busy machine, OpenMP threads that wait for each other cost more than they bring.
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_pydoc_llama", MODEL / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_the_bundled_model_has_the_documented_size_and_perplexity(script: ModuleType) -> None:
    model = load(MODEL)
    assert sum(p.numel() for p in model.parameters()) == 2_828_736
    rows_NL = script.rows(np.load(MODEL / "val_ids.npy").ravel(), 320, "validation")
    assert rows_NL.shape == (320, 256)
    assert script.perplexity(model, rows_NL) == pytest.approx(15.9935, abs=0.001)


def test_the_ids_decode_to_the_text_that_the_tokenizer_encodes() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    calib = np.load(MODEL / "calib_ids.npy")
    val = np.load(MODEL / "val_ids.npy")
    assert (calib.dtype, calib.shape) == (np.uint16, (512, 256))
    assert (val.dtype, val.shape) == (np.uint16, (320, 256))
    val = val.ravel()
    second_file = int(np.flatnonzero(val == 0)[1])
    text = tokenizer.decode(val[1:second_file].tolist())
    assert text.startswith(".. _reporting-bugs:\n\n*****************\nDealing with Bugs")
    assert tokenizer(text)["input_ids"] == val[1:second_file].tolist()


def corpus(root: Path) -> list[str]:
    """Write 43 small files, two of them under names that validate the bundled model; return the options."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop_", k=rng.randint(2, 8))) for _ in range(400)]
    names = ["docs/bugs.rst", "docs/howto/logging.rst.txt", *(f"docs/page{i}.rst" for i in range(20))]
    names += [*(f"lib/module{i}.py" for i in range(20)), "lib/test/left_out.py"]
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choices(words, k=300)))
    return ["--docs", str(root / "docs"), "--stdlib", str(root / "lib"), "--out", str(root / "out")]


def test_the_training_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(MODEL / "train.py"), *corpus(tmp_path), "--steps", "2", "--batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False)
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
    ids = {name: np.load(tmp_path / f"out/{name}_ids.npy") for name in ("train", "val", "calib")}
    assert all(i.dtype == np.uint16 for i in ids.values())
    assert ids["calib"].shape == (len(ids["train"]) // 256, 256)
    assert sum(int((ids[split] == 0).sum()) for split in ("train", "val")) == 42  # lib/test is left out
    assert ids["train"][0] == ids["val"][0] == 0
    model = load(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == 2_828_736


def test_files_validate_by_the_name_they_had_in_the_documentation_package(script: ModuleType, tmp_path: Path) -> None:
    corpus(tmp_path)
    docs = script.docs_sources(tmp_path / "docs")
    validating = {s.name.removeprefix(script.DOCS_PREFIX) for s in docs if s.validates}
    assert {"bugs.rst.txt", "howto/logging.rst.txt"} <= validating
    assert len(validating) < len(docs) == 22
    assert script.Source("timeit.py", "").validates
    assert not script.Source("this.py", "").validates


def test_the_learning_rate_warms_up_and_falls_to_5_percent(script: ModuleType) -> None:
    assert script.rate(0, 3491) == pytest.approx(1 / 50, rel=1e-3)
    assert script.rate(50, 3491) == pytest.approx(1.0, rel=1e-3)
    assert script.rate(3491, 3491) == pytest.approx(0.05)


def test_the_matrices_of_the_blocks_learn_by_muon_and_the_rest_by_adamw(script: ModuleType) -> None:
    muon, adamw = script.optimizers(load(MODEL))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [len(o.param_groups[0]["params"]) for o in (muon, adamw)] == [6 * 7, 1 + 6 * 2 + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--docs", "nowhere"], "no .rst or .rst.txt file under --docs nowhere"),
        (["--stdlib", "nowhere"], "no .py file under --stdlib nowhere"),
        (["--steps", "0"], "--steps and --batch must be at least 1, got 0 and 16"),
    ],
)
def test_the_training_script_names_what_is_wrong(
    *,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *corpus(tmp_path), *options])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
