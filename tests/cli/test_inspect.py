"""``secateur inspect``: what can be cut, from the config alone."""

import json
from pathlib import Path

import pytest
import torch
from cli_models import save_model
from tiny import tiny

from secateur.cli import main, tables
from secateur.space.inputs import example_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("inspect") / "llama", tokenizer=False)


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["inspect", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_json_is_one_object_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, folder, "--json", "--kv-batch", 2, "--kv-seq-len", 10))
    kinds = {entry["kind"]: entry for entry in found["kinds"]}
    assert {k: (kinds[k]["config"], kinds[k]["axes"], kinds[k]["sizes"], kinds[k]["groups"]) for k in kinds} == {
        "hidden": ("hidden_size", 1, [48], [1]),
        "ffn": ("intermediate_size", 2, [80], [1]),
        "kv_groups": ("num_key_value_heads", 2, [2], [1]),
        "heads": ("num_attention_heads", 2, [4], [2]),
        "layers": ("num_hidden_layers", 1, [2], []),
        "attention": (None, 1, [2], []),
        "mlp": (None, 1, [2], []),
    }
    assert found["class"] == "LlamaForCausalLM"
    assert found["blocks"] == {"layers": 2, "attention": 2, "mlp": 2}
    params = 320 * 48 + 2 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 80 + 2 * 48) + 48
    rows = example_inputs(tiny("llama", dtype=torch.float32))["input_ids"].shape[1]
    linear = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80) + 320 * 48
    assert found["costs"].pop("macs") == rows * linear + 2 * 2 * rows * rows * 48
    assert found["costs"] == {"params": params, "active_params": params, "memory": 4 * params + 2 * 10 * 4 * 2 * 48}
    assert any("looked up by number" in reason for reason in found["frozen"])
    assert "axes" not in found


def test_axes_are_listed_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, folder, "--json", "--axes"))
    axes = {entry["name"]: entry for entry in found["axes"]}
    assert len(axes) == 7
    assert sum(a["kind"] == "ffn" and a["size"] == 80 and a["tensors"] == 3 for a in axes.values()) == 2


def test_people_get_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, folder, "--axes")
    assert "LlamaForCausalLM: 52,464 parameters" in text
    for word in ("intermediate_size", "in 2 groups", "model.layers.0.mlp.ffn", "Frozen"):
        assert word in text


def test_no_weights_are_needed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "52,464" in shown(capsys, tmp_path)


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (3 * 2**29, "1.50 GiB"), (2**41, "2.00 TiB")],
)
def test_bytes_as_text(count: int, text: str) -> None:
    assert tables.bytes_text(count) == text


def test_shares() -> None:
    assert tables.share(1, 3) == "33.3%"
    assert tables.share(1, 0) == "-"
