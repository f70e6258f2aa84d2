"""What a teacher said, kept on disk: as good as the teacher, gone on with after a kill, and of one run only."""

from pathlib import Path
from typing import Any

import heal
import numpy as np
import pytest
import torch

from secateur.errors import SecateurError
from secateur.load.feed import feed_of
from secateur.methods.healing import cache_teacher, distill
from secateur.train import teacher as asked
from secateur.train.teacher import Cached, Live, cache

GIVEN: dict[str, Any] = {"steps": 4, "lr": 0.01, "batch_size": 4, "eval_data": heal.rows(5, seed=7)}
FILES = ("logs.f16", "which.i32", "offsets.npy", "numbers.npy", "meta.json")


def student(**options: Any) -> Any:
    return heal.llama(seed=4, intermediate_size=12, **options)


def losses(report: Any) -> list[float]:
    return [entry["train"]["loss"] for entry in report["history"][1:]]


@pytest.mark.parametrize("top_k", [6, 48, None])
@pytest.mark.parametrize("data", ["rows", "padded", "given"])
def test_a_cached_run_is_nearly_the_live_one(data: str, top_k: int | None, tmp_path: Path) -> None:
    made: Any = heal.rows(12)
    if data == "padded":
        made = [heal.padded(heal.rows(4, seed=i), left=True) for i in range(3)]
    if data == "given":
        made = [heal.rows(4), heal.rows(3, 6), heal.rows(2, 5)]
    given = {**GIVEN, "temperature": 1.5, "eval_every": 1}
    live = distill(heal.llama(), student(), made, top_k=top_k, **given)
    kept = distill(heal.llama(), student(), made, top_k=top_k, cache=tmp_path / "c", **given)
    assert losses(kept.report) == pytest.approx(losses(live.report), rel=3e-3)
    assert kept.report["after"]["kl"] == pytest.approx(live.report["after"]["kl"], rel=3e-3)
    alone = distill(None, student(), made, top_k=top_k, cache=tmp_path / "c", **given)
    assert alone.report["history"] == kept.report["history"]
    assert heal.same(alone.model, kept.model)


def test_without_the_teacher_the_rate_is_the_same(tmp_path: Path) -> None:
    given = {**GIVEN, "lr": None, "cache": tmp_path / "c"}
    with_teacher = distill(heal.llama(), student(), heal.rows(12), **given)
    alone = distill(None, student(), heal.rows(12), **given)
    assert alone.report["lr"] == with_teacher.report["lr"] > 0
    assert "teacher" in with_teacher.report
    assert heal.same(alone.model, with_teacher.model)


def test_the_signals_are_those_of_the_teacher(tmp_path: Path) -> None:
    feed: Any = feed_of([heal.padded(heal.rows(4, seed=i)) for i in range(3)], batch_size=4, seed=0)
    wanted = {"teacher": "x", "params": 1, "data": "d", "temperature": 2.0, "top_k": 5}
    found = cache(heal.llama(), feed, range(12), tmp_path / "c", wanted, batch_size=5)
    numbers = (7, 0, 3)
    kept, live = (
        t.says(feed.rows(numbers), numbers, (), attention=False).signal for t in (found, Live(heal.llama(), 2.0, 5, {}))
    )
    assert kept is not None
    assert live is not None
    assert kept.which is not None
    assert live.which is not None
    assert (kept.classes, kept.logs.dtype) == (heal.VOCAB, torch.float16)
    assert torch.equal(kept.which.long(), live.which)
    assert torch.allclose(kept.logs.float(), live.logs, rtol=1e-3)
    assert found.lacks([0, 11, 12, 13]) == 2


def test_a_killed_caching_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_SAVED_EVERY", 2)
    feed: Any = feed_of([heal.padded(heal.rows(4, seed=i)) for i in range(5)], batch_size=4, seed=0)
    wanted = {"teacher": "x", "params": 1, "data": "d", "temperature": 1.0, "top_k": 5}
    seen = []

    def stop(items: Any, what: str) -> Any:
        for index, item in enumerate(items):
            seen.append(list(item))
            if index == 5:
                raise KeyboardInterrupt
            yield item

    whole = cache(heal.llama(), feed, range(20), tmp_path / "whole", wanted, batch_size=3)
    assert isinstance(whole, Cached)
    with pytest.raises(KeyboardInterrupt):
        cache(heal.llama(), feed, range(20), tmp_path / "c", wanted, batch_size=3, track=stop)
    assert not (tmp_path / "c").exists()
    with (tmp_path / "c.partial" / "logs.f16").open("ab") as file:
        file.write(b"what the kill left half written")
    seen.clear()

    def note(items: Any, what: str) -> Any:
        for item in items:
            seen.append(list(item))
            yield item

    cache(heal.llama(), feed, range(20), tmp_path / "c", wanted, batch_size=3, track=note)
    assert seen[0] == [12, 13, 14]
    for name in FILES:
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "whole"]
    # What another teacher left half done is not gone on with.
    with pytest.raises(KeyboardInterrupt):
        cache(heal.llama(seed=1), feed, range(20), tmp_path / "d", {**wanted, "teacher": "y"}, batch_size=3, track=stop)
    cache(heal.llama(), feed, range(20), tmp_path / "d", wanted, batch_size=3)
    assert (tmp_path / "d" / "logs.f16").read_bytes() == (tmp_path / "whole" / "logs.f16").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "c"
    cache_teacher(heal.llama(), student(), heal.rows(24), cache=folder, **GIVEN)
    return folder


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"teacher": heal.llama(seed=8)}, "another teacher"),
        ({"teacher_dtype": "bfloat16"}, "another teacher"),
        ({"data": heal.rows(24, seed=8)}, "other data"),
        ({"seed": 1, "steps": 2}, "of the 8 rows that this run needs (it is longer, or draws them by another seed)"),
        ({"steps": 5}, "lacks 4 of the 20 rows that this run needs"),
        ({"temperature": 2.0}, "temperature 1.0, not 2.0"),
        ({"top_k": 7}, "top_k 64, not 7"),
        ({"eval_data": heal.rows(5, seed=1)}, "held-out holds logits of other data"),
    ],
)
def test_the_cache_of_another_run_is_refused(changed: dict[str, Any], says: str, made: Path) -> None:
    given = {**GIVEN, "teacher": heal.llama(), "data": heal.rows(24), **changed}
    with pytest.raises(SecateurError) as error:
        distill(given.pop("teacher"), student(), given.pop("data"), cache=made, **given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert str(made) in str(error.value)


def test_a_cache_without_what_is_needed(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="no cache of a teacher's logits is there: give the teacher"):
        distill(None, student(), heal.rows(12), cache=tmp_path / "none", **GIVEN)
    with pytest.raises(SecateurError, match="give the teacher, or a cache of its logits"):
        distill(None, student(), heal.rows(12), **GIVEN)
    with pytest.raises(SecateurError, match="a data loader makes its batches anew in every epoch"):
        distill(heal.net(), heal.net(seed=1), heal.loader(), cache=tmp_path / "c", steps=2)
    with pytest.raises(SecateurError, match="hidden and attention need the teacher in every step: leave cache out"):
        distill(heal.llama(), student(), heal.rows(12), cache=made, hidden=1.0, **GIVEN)


def test_a_student_of_other_classes_than_the_cache(tmp_path: Path) -> None:
    small = student(vocab_size=40)
    low = heal.rows(12) % 37 + 3
    kept = tmp_path / "c"
    given = {key: value for key, value in GIVEN.items() if key != "eval_data"}
    cache_teacher(heal.llama(), student(), low, cache=kept, **given)
    with pytest.raises(SecateurError, match="gives 48 numbers for each prediction and the student 40"):
        distill(None, small, low, cache=kept, **given)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_told(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    given = {key: value for key, value in GIVEN.items() if key != "eval_data"}
    cache_teacher(heal.llama(), student(), heal.rows(12), cache=folder, **given)
    path = folder / "train" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SecateurError, match="this cache of a teacher is damaged: remove it") as error:
        distill(heal.llama(), student(), heal.rows(12), cache=folder, **given)
    assert "\n" not in str(error.value)


def test_six_bytes_for_each_logit(made: Path) -> None:
    offsets = np.load(made / "train" / "offsets.npy")
    assert offsets[-1] == 16 * 7
    assert (made / "train" / "logs.f16").stat().st_size == 16 * 7 * heal.VOCAB * 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SecateurError, match="the teacher's logits cannot be kept there"):
        cache_teacher(heal.llama(), student(), heal.rows(12), cache=tmp_path / "file" / "c", **GIVEN)


def test_a_teacher_that_gives_no_numbers() -> None:
    broken = heal.llama()
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(SecateurError, match="the teacher's outputs are not finite"):
        distill(broken, student(), heal.rows(12), **GIVEN)
