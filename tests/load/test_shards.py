"""Safetensors files and journals of streamed runs: what is damaged is told, and what is not finished is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError
from secateur.load.journal import Journal, Spill
from secateur.load.shards import Shard, write_shard


def changed(path: Path, **entry: Any) -> Path:
    """A file whose header says something else of its one tensor."""
    write_shard(path, {"a": torch.arange(6.0).reshape(2, 3)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


def test_values_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "none": torch.empty(0, 4), "one": torch.ones(())}
    write_shard(tmp_path / "x.safetensors", tensors, {"values": "1"})
    shard = Shard(tmp_path / "x.safetensors")
    assert shard.metadata == {"values": "1"}
    for name, tensor in tensors.items():
        for found in (shard.read(name), shard.mapped(name)):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"data_offsets": [24, 0]}, r"a is F32 \[2, 3\], and has -24 bytes"),
        ({"data_offsets": [-24, 0]}, r"a is F32 \[2, 3\], and has 24 bytes"),
        ({"data_offsets": [0, 20]}, r"a is F32 \[2, 3\], and has 20 bytes"),
        ({"shape": [2, 2]}, r"a is F32 \[2, 2\], and has 24 bytes"),
        ({"data_offsets": [100, 124]}, "cut short"),
        ({"dtype": "F8_E4M3"}, "F8_E4M3, which cannot be pruned"),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, entry: dict[str, Any], told: str) -> None:
    with pytest.raises(SecateurError, match=told):
        Shard(changed(tmp_path / "x.safetensors", **entry))


def test_a_header_longer_than_any_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63 + 5).to_bytes(8, "little") + b"{}")
    with pytest.raises(SecateurError, match="no readable safetensors file"):
        Shard(path)


def test_a_full_disk_leaves_no_activations(tmp_path: Path) -> None:
    path = tmp_path / "acts.bin"
    path.symlink_to("/dev/full")
    spill = Spill(path)
    with pytest.raises(SecateurError, match=r"acts.bin: cannot be written \(No space left on device\)"):
        spill.add(torch.ones(100_000))
    spill.add(torch.ones(3))
    spill.drop()  # what is left in a buffer must not raise again, now or when the file is collected
    assert not path.is_symlink()


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"done": 1, "kept": {"a": [[1]]}}'])
def test_a_damaged_journal(tmp_path: Path, content: str) -> None:
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(SecateurError, match=r"done.json: is damaged .*begin anew \(--restart\)"):
        Journal(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "walk").write_text("a file")
    with pytest.raises(SecateurError, match="walk: cannot be written"):
        Journal(tmp_path / "walk")
