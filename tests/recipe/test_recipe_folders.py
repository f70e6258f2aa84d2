"""What a recipe keeps of its steps: nothing is done twice, what was cut off goes on, and the result is the same."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_model import DISTILL, FINETUNE, NAME, OWN, PRUNE, mapping, module_in
from torch import nn

import secateur
from secateur import recipe
from secateur.errors import SecateurError
from secateur.recipe import steps as table

RECIPE = mapping(PRUNE, DISTILL, {"evaluate": {}}, PRUNE, FINETUNE, {"report": {}})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with module_in(tmp_path, monkeypatch) as folder:
        yield folder


def same(a: nn.Module, b: nn.Module) -> bool:
    found = [list(model.state_dict().values()) for model in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def untimed(value: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(value, dict):
        gone = ("seconds", "spent", "fingerprint", "resumed", "logs", "files", "recipe")
        return {key: untimed(entry) for key, entry in value.items() if key not in gone}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


class StoppedError(Exception):
    """Stands for a kill."""


def stop_at(number: int) -> Any:
    def tell(entry: Any) -> None:
        if entry["number"] == number:
            raise StoppedError

    return tell


def test_each_step_is_kept_and_a_second_run_does_nothing(place: Path) -> None:
    done = recipe.load(RECIPE).run()
    kept = sorted(path.name for path in (place / "small.steps").iterdir())
    assert kept == ["01-prune", "02-distill", "03-evaluate", "04-prune", "05-finetune", "06-report"]
    assert same(secateur.load("small.steps/05-finetune"), done.model)
    assert not same(secateur.load("small.steps/04-prune"), done.model)
    assert (place / "small.steps/02-distill/metrics/metrics.jsonl").is_file()
    assert (place / "small/report.md").read_text() == (place / "small.steps/06-report/files/report.md").read_text()
    notes: list[str] = []
    before = (place / "small/model.safetensors").stat().st_mtime_ns
    again = recipe.load(RECIPE).run(on_note=notes.append, on_step=stop_at(1))
    assert notes == ["small was made by this very recipe: there is nothing to do"]
    assert again.report == done.report
    assert same(again.model, done.model)
    assert (place / "small/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same(place: Path, number: int) -> None:
    whole = recipe.load({**RECIPE, "out": "whole"}).run()
    with pytest.raises(StoppedError):
        recipe.load(RECIPE).run(on_step=stop_at(number))
    assert not (place / "small").exists()
    notes: list[str] = []
    told: list[int] = []
    done = recipe.load(RECIPE).run(on_note=notes.append, on_step=lambda entry: told.append(entry["number"]))
    assert told == list(range(number + 1, 7))
    which = "step 1 is" if number == 1 else f"steps 1 to {number} are"
    assert notes == [f"{which} done already, in small.steps"]
    assert same(done.model, whole.model)
    assert same(secateur.load("small"), whole.model)
    assert untimed(done.report) == untimed(whole.report)
    assert (place / "small/report.md").is_file()


def test_a_training_that_was_cut_off_goes_on_within_its_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = mapping(PRUNE, {"distill": {**DISTILL["distill"], "cache": True}})
    whole = recipe.load({**steps, "out": "whole"}).run()
    saved = torch.optim.AdamW.step
    count = 0

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise StoppedError
        return saved(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    with pytest.raises(StoppedError):
        recipe.load(steps).run()
    monkeypatch.setattr(torch.optim.AdamW, "step", saved)
    assert (place / "small.steps/02-distill.work/teacher").is_dir()
    notes: list[str] = []
    done = recipe.load(steps).run(on_note=notes.append)
    assert notes[-1] == "step 2, distill, goes on from where it was cut off"
    assert done.report["steps"][1]["training"]["resumed"] >= 4
    assert same(done.model, whole.model)
    assert not (place / "small.steps/02-distill.work").exists()


def test_what_changed_is_done_again_from_there_on(place: Path) -> None:
    recipe.load(RECIPE).run()
    notes: list[str] = []
    told: list[int] = []

    def again(*overrides: str, **more: Any) -> Any:
        notes.clear()
        told.clear()
        chosen = recipe.load(RECIPE, [*overrides], overwrite=True, **more)
        return chosen.run(on_note=notes.append, on_step=lambda entry: told.append(entry["number"]))

    again("steps.2.lr=0.02")
    assert told == [2, 3, 4, 5, 6]
    assert notes == ["step 1 is done already, in small.steps", "step 2, distill, is done again: lr changed"]
    again("steps.2.lr=0.02", "steps.5.steps=2")
    assert told == [5, 6]
    assert notes[-1] == "step 5, finetune, is done again: steps changed"
    again("steps.2.lr=0.02", "steps.5.steps=2")
    assert told == []
    (place / f"{NAME}.py").write_text(OWN + "\n# changed\n")
    again("steps.2.lr=0.02", "steps.5.steps=2")
    assert told == [1, 2, 3, 4, 5, 6]
    assert notes == ["step 1, prune, is done again: data changed, eval_data changed, model changed"]
    again("steps.2.lr=0.02", "steps.5.steps=2", "seed=4")
    assert notes == ["step 1, prune, is done again: seed changed"]
    again("steps.2.lr=0.02", "steps.5.steps=2", "seed=4", fresh=True)
    assert (notes, told) == ([], [1, 2, 3, 4, 5, 6])


def test_what_an_older_run_left_behind_a_changed_step_is_not_taken(place: Path) -> None:
    recipe.load(RECIPE).run()
    with pytest.raises(StoppedError):
        recipe.load(RECIPE, ["steps.2.lr=0.02"], overwrite=True).run(on_step=stop_at(2))
    notes: list[str] = []
    told: list[int] = []
    again = recipe.load(RECIPE, ["steps.2.lr=0.02"], overwrite=True)
    again.run(on_note=notes.append, on_step=lambda entry: told.append(entry["number"]))
    assert told == [3, 4, 5, 6]
    assert notes[-1] == "step 3, evaluate, is done again: a step before it changed"


def test_another_step_takes_the_place_of_the_old_one(place: Path) -> None:
    recipe.load(mapping(PRUNE, DISTILL)).run()
    notes: list[str] = []
    recipe.load(mapping(PRUNE, FINETUNE), overwrite=True).run(on_note=notes.append)
    assert notes[-1] == "step 2, finetune, is done again: it was distill"
    assert sorted(path.name for path in (place / "small.steps").iterdir()) == ["01-prune", "02-finetune"]


def test_a_damaged_step_is_done_again(place: Path) -> None:
    done = recipe.load(mapping(PRUNE, FINETUNE)).run()
    (place / "small.steps/01-prune/step.json").write_text("{")
    shutil.rmtree(place / "small")
    told: list[int] = []
    again = recipe.load(mapping(PRUNE, FINETUNE)).run(on_step=lambda entry: told.append(entry["number"]))
    assert told == [1, 2]
    assert same(again.model, done.model)


def test_a_result_of_another_recipe_is_in_the_way(place: Path) -> None:
    recipe.load(mapping(PRUNE)).run()
    with pytest.raises(SecateurError, match="small: exists already"):
        recipe.load(mapping(PRUNE, FINETUNE))
    recipe.load(mapping(PRUNE))
    with pytest.raises(SecateurError, match="small: exists already"):
        recipe.load(mapping(PRUNE), fresh=True)


def test_training_that_diverges_ends_the_recipe_and_keeps_what_is_done(place: Path) -> None:
    steps = mapping(PRUNE, {"finetune": {"steps": 30, "lr": 1e30, "optimizer": "sgd", "clip": 0, "warmup": 0}})
    with pytest.raises(SecateurError, match=r"^step 2, finetune: .*diverged"):
        recipe.load(steps).run()
    assert not (place / "small").exists()
    assert (place / "small.steps/01-prune/step.json").is_file()
    assert not (place / "small.steps/02-finetune").exists()


def test_a_full_disc_is_one_error_and_leaves_nothing_half_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "step.json" and "02-adapt" in str(self):
            raise OSError(28, os.strerror(28))
        return written(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SecateurError) as caught:
        recipe.load(mapping(PRUNE, {"adapt_batch_norm": {}})).run()
    text = "small.steps/02-adapt_batch_norm: cannot be written (No space left on device); steps that are done stay in"
    assert str(caught.value) == f"step 2, adapt_batch_norm: {text} small.steps"
    assert sorted(p.name for p in (place / "small.steps").glob("*")) == ["01-prune", "02-adapt_batch_norm.work"]
    monkeypatch.setattr(Path, "write_text", written)
    told: list[int] = []
    recipe.load(mapping(PRUNE, {"adapt_batch_norm": {}})).run(on_step=lambda entry: told.append(entry["number"]))
    assert told == [2]


def test_an_error_while_saving_names_the_step_and_not_a_hidden_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("secateur.ship.built.save_file", full)
    with pytest.raises(
        SecateurError, match=r"^step 1, prune: .*small.steps/01-prune: the result cannot be written"
    ) as e:
        recipe.load(mapping(PRUNE)).run()
    assert "partial" not in str(e.value)
    assert [p.name for p in (place / "small.steps").iterdir()] == ["01-prune.work"]


def test_every_step_of_the_table_is_one_that_looks_trains_or_changes() -> None:
    known = {*table.LOOKING, *table.TRAINING, *table.CUTTING, "adapt_batch_norm"}
    assert known == set(table.STEPS)


def test_the_record_says_what_the_step_was(place: Path) -> None:
    recipe.load(mapping(PRUNE, {"evaluate": {}})).run()
    first = json.loads((place / "small.steps/01-prune/step.json").read_text())
    second = json.loads((place / "small.steps/02-evaluate/step.json").read_text())
    assert (first["changed"], first["plan"], second["changed"]) == (True, True, False)
    assert second["parts"]["before"] == first["fingerprint"] != second["fingerprint"]
    assert first["parts"]["options"]["budget"] == "params=70%"
    assert secateur.Plan.load(place / "small.steps/01-prune").origin["budget"] == "params=70%"
    assert not (place / "small.steps/02-evaluate/model.safetensors").exists()
