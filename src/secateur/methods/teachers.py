"""Who is asked in distillation: the teacher itself, or what it said once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.feed import Feed, Given, Rows, used_numbers
from secateur.methods.feeding import data_print, vocabulary_of
from secateur.progress import Track
from secateur.train import sharded
from secateur.train.objective import EVALUATED_TOP_K
from secateur.train.settings import Distillation, Training
from secateur.train.teacher import CACHED_TOP_K, Cached, Live, Teacher, cache


def teachers(
    teacher: nn.Module | None, folder: Path | None, feed: Feed, held_out: Sequence[Batch] | None, steps: int,
    settings: Training, losses: Distillation, track: Track,
) -> tuple[Teacher, Teacher | None]:  # fmt: skip
    """Who is asked in training, and who about held-out data, at temperature 1.

    Raises:
        SecateurError: for a cache that cannot be made, or is of something else.
    """
    who: dict[str, Any] = {"teacher": "", "params": 0}
    if teacher is not None:
        who = {"teacher": sharded.print_of(teacher), "params": sum(p.numel() for p in teacher.parameters())}
    if folder is None:
        live = there(teacher)
        asks = None if held_out is None else Live(live, 1.0, EVALUATED_TOP_K, who)
        return Live(live, losses.temperature, losses.top_k, who), asks
    if not isinstance(feed, Rows | Given):
        raise SecateurError(
            "cache: a data loader makes its batches anew in every epoch: give a list of batches or rows"
        )
    if world.size() > 1 and not isinstance(feed, Rows):
        raise SecateurError(
            "cache: batches of different shapes are cached whole, and several processes share each: "
            "leave cache out, or train in one process"
        )
    numbers = used_numbers(feed, steps * settings.accumulate)
    wanted = {**who, "data": data_print(feed), "temperature": losses.temperature}
    wanted["top_k"] = losses.top_k or CACHED_TOP_K
    size = feed.batch_size if isinstance(feed, Rows) else 1
    source = _kept(teacher, feed, numbers, folder / "train", wanted, size, track)
    if held_out is None:
        return source, None
    own = Given(held_out, 0)
    asked = {**who, "data": data_print(own), "temperature": 1.0, "top_k": EVALUATED_TOP_K}
    judge = _kept(teacher, own, range(len(held_out)), folder / "held-out", asked, 1, track)
    return source, judge


def _kept(
    teacher: nn.Module | None, feed: Rows | Given, numbers: Sequence[int], folder: Path, wanted: Mapping[str, Any],
    size: int, track: Track,
) -> Cached:  # fmt: skip
    """The cache of a teacher's logits, made where it is not there yet."""
    if not world.from_first((folder / "meta.json").exists):
        if teacher is None:
            raise SecateurError(f"{folder}: no cache of a teacher's logits is there: give the teacher, and it is made")
        return cache(teacher, feed, list(numbers), folder, wanted, batch_size=size, track=track)
    found = Cached(folder)
    for key, value in wanted.items():
        if found.identity[key] != value and not (key in ("teacher", "params") and teacher is None):
            what = {"teacher": "another teacher", "data": "other data"}
            raise SecateurError(
                f"{folder} holds logits of {what.get(key, f'{key} {found.identity[key]}, not {value}')}: "
                "give another folder for the cache, or remove this one"
            )
    missing = found.lacks(numbers)
    if missing:
        raise SecateurError(
            f"{folder} lacks {missing} of the {len(numbers)} rows that this run needs (it is longer, or draws them by "
            "another seed): give another folder for the cache, or remove this one"
        )
    return found


def same_vocabulary(teacher: nn.Module, student: nn.Module) -> None:
    """Raise SecateurError for models that know other numbers of tokens."""
    sizes = [vocabulary_of(model) for model in (teacher, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise SecateurError(
            f"the teacher has a vocabulary of {sizes[0]} and the student one of {sizes[1]}: both need one tokenizer"
        )


def there(teacher: nn.Module | None) -> nn.Module:
    """The teacher, where one is needed.

    Raises:
        SecateurError: There is none.
    """
    if teacher is None:
        raise SecateurError("give the teacher: nothing is cached in its place")
    return teacher
