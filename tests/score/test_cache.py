"""What is kept is found again under all that it depends on, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import SecateurError
from secateur.score import cache as module
from secateur.score.cache import Cache, Entry

PARTS: dict[str, Any] = {"model": "abc", "data": "def", "what": "probes", "choices": {"ffn": [8, 4]}, "layers": True}


def never() -> Entry:
    raise AssertionError("computed again")


def counting(value: float = 1.0) -> tuple[Callable[[], Entry], list[int]]:
    calls: list[int] = []

    def compute() -> Entry:
        calls.append(1)
        return {"x": torch.arange(3.0) + value}, {"blocks": {"a": 0.1 + value}, "count": 3}

    return compute, calls


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_hit_does_not_compute_and_is_the_same(tmp_path: Path) -> None:
    compute, calls = counting()
    first = Cache(tmp_path / "new/folder").get(PARTS, compute)
    again = Cache(tmp_path / "new/folder").get(dict(reversed(PARTS.items())), never)
    assert calls == [1]
    assert torch.equal(first[0]["x"], again[0]["x"])
    assert first[0]["x"].dtype == again[0]["x"].dtype
    assert first[1] == again[1] == {"blocks": {"a": 1.1}, "count": 3}


def test_an_entry_without_tensors_is_kept_too(tmp_path: Path) -> None:
    ladder = [[[], 0.0], [["model.layers.1"], 1 / 3]]
    Cache(tmp_path).get(PARTS, lambda: ({}, {"ladder": ladder}))
    assert Cache(tmp_path).get(PARTS, never) == ({}, {"ladder": ladder})


@pytest.mark.parametrize(
    "change",
    [
        {"model": "abd"}, {"data": "d"}, {"what": "depth"}, {"choices": {"ffn": [8, 2]}}, {"choices": {"ffn": [4, 8]}},
        {"choices": {"hidden": [8, 4]}}, {"layers": False}, {"layers": 1}, {"more": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_key_depends_on_every_part(tmp_path: Path, change: dict[str, Any]) -> None:
    compute, calls = counting()
    cache = Cache(tmp_path)
    cache.get(PARTS, compute)
    cache.get({**PARTS, **change}, compute)
    assert len(calls) == len(files(tmp_path)) == 2
    cache.get(PARTS, never)
    cache.get({**PARTS, **change}, never)


@pytest.mark.parametrize("left_out", sorted(PARTS))
def test_a_part_that_is_left_out_is_another_key(tmp_path: Path, left_out: str) -> None:
    compute, calls = counting()
    Cache(tmp_path).get(PARTS, compute)
    Cache(tmp_path).get({k: v for k, v in PARTS.items() if k != left_out}, compute)
    assert len(calls) == 2


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.booleans(), max_size=4))
def test_whatever_the_parts_say_they_are_found_again(parts: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        compute, calls = counting()
        for _ in range(2):
            Cache(Path(folder)).get(parts, compute)
        assert len(calls) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "nonsense"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    Cache(tmp_path).get(PARTS, counting()[0])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[:-5], "empty": b"", "nonsense": b"x" * 200}[damage])
    with pytest.raises(SecateurError) as caught:
        Cache(tmp_path).get(PARTS, never)
    assert str(caught.value).startswith(f"the cache file {path} is damaged (")
    assert str(caught.value).endswith("): delete it")
    path.unlink()
    assert Cache(tmp_path).get(PARTS, counting()[0])[1]["count"] == 3


def test_a_file_about_other_parts_is_not_believed(tmp_path: Path) -> None:
    Cache(tmp_path).get(PARTS, counting()[0])
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["key"]) == PARTS
    save_file({"x": torch.zeros(3)}, path, metadata={**metadata, "key": json.dumps({"model": "other"})})
    with pytest.raises(SecateurError, match=r"belongs to another key: delete it"):
        Cache(tmp_path).get(PARTS, never)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_partial_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def half(_: Any, path: Path, **__: Any) -> None:
        assert path.suffix != ".safetensors"
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(type(error)):
        Cache(tmp_path).get(PARTS, counting()[0])
    assert files(tmp_path) == []
    monkeypatch.undo()
    compute, calls = counting()
    Cache(tmp_path).get(PARTS, compute)
    assert calls == [1]


def test_what_fails_to_compute_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="computed again"):
        Cache(tmp_path / "folder").get(PARTS, never)
    assert not (tmp_path / "folder").exists() or files(tmp_path / "folder") == []


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compute, calls = counting()
    for _ in range(2):
        assert Cache(None).get(PARTS, compute)[1]["count"] == 3
    assert len(calls) == 2
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SecateurError, match="file"):
        Cache(tmp_path / "file").get(PARTS, counting()[0])
