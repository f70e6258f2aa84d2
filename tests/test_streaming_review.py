"""Streamed runs in corners: kinds of models whose weights or blocks are unlike most, and folders that are taken."""

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny, tokens
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

import secateur
from secateur.cli import main
from secateur.load.model import load_model
from secateur.load.store import held, store_of
from secateur.load.streamed import load_streamed

ROWS, EVAL = tokens(6, 16, seed=1), tokens(3, 16, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Checkpoints: blocks that give None beside a tensor, experts in bfloat16, biases, and an ordinary one."""
    top = tmp_path_factory.mktemp("checkpoints")
    small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    opt = OPTConfig(**small, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)
    made: dict[str, Any] = {
        "falcon": FalconForCausalLM(FalconConfig(**small)),
        "experts": tiny("mixtral", dtype=torch.bfloat16),
        "biases": OPTForCausalLM(opt).bfloat16(),
        "llama": tiny("llama", dtype=torch.float32),
    }
    for name, model in made.items():
        model.save_pretrained(top / name)
    return {name: top / name for name in made}


@pytest.mark.parametrize(
    ("name", "dtype", "method", "budget", "options"),
    [
        ("falcon", None, "wanda", "sparsity=50%", {}),
        ("experts", None, "minitron", {"intermediate_size": 48}, {"mend": "none"}),
        ("biases", "float32", "flap", "params=90%", {}),
        ("biases", "float32", "minitron", {"ffn_dim": 48}, {"mend": "bias"}),
    ],
)
def test_as_in_memory(
    folders: Mapping[str, Path], tmp_path: Path, name: str, dtype: Any, method: str, budget: Any, options: Any
) -> None:
    given = {"method": method, "data": ROWS, "eval_data": EVAL, "batch_size": 4, **options}
    whole = secateur.prune(load_model(folders[name], dtype=dtype)[0], budget, **given)
    found = secateur.prune(load_streamed(folders[name], work=tmp_path, dtype=dtype)[0], budget, **given)
    assert whole.report["measured"] == found.report["measured"]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert store_of(found.model) is not None
    with held(found.model):
        for (one, x), (two, y) in zip(whole.model.named_parameters(), found.model.named_parameters(), strict=True):
            assert one == two
            assert torch.equal(x, y), one


@pytest.fixture
def words(folders: Mapping[str, Path], tmp_path: Path) -> list[str]:
    np.save(tmp_path / "ids.npy", ROWS.numpy())
    return [
        *("prune", str(folders["llama"]), "--method", "magnitude", "--budget", "sparsity=50%", "--stream"),
        *("--out", str(tmp_path / "out"), "--data", str(tmp_path / "ids.npy"), "--seq-len", "16"),
    ]


def test_two_runs_do_not_share_a_folder(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out.streaming"
    folder.mkdir()
    for more in ([], ["--restart"]):
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert main([*words, *more]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "another run is at work there" in told
        assert (folder / "lock").exists()
    assert main(words) == 0
    assert not folder.exists()


def test_restart_removes_nothing_else(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "out.streaming" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main([*words, "--restart"]) == 2
    assert "is in the way" in " ".join(capsys.readouterr().err.split())
    assert mine.exists()


def test_a_damaged_record_says_what_to_do(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "out.streaming" / "run.json"
    record.parent.mkdir()
    record.write_text("")
    assert main(words) == 2
    assert "--restart" in capsys.readouterr().err
    assert main([*words, "--restart"]) == 0
    assert not record.parent.exists()
