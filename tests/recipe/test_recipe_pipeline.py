"""Steps that train and write, each beside the same by hand; the same steps as calls on an object; estimates."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_model import DISTILL, NAME, PRUNE, mapping, module_in
from torch import nn

import secateur
from secateur import recipe
from secateur.errors import SecateurError
from secateur.methods import healing
from secateur.recipe import Pipeline


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with module_in(tmp_path, monkeypatch) as folder:
        yield folder


def own() -> Any:
    import importlib

    return importlib.import_module(NAME)


def same(a: nn.Module, b: nn.Module) -> bool:
    found = [list(model.state_dict().values()) for model in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def pruned() -> nn.Module:
    example = torch.zeros(2, 3, 6, 6)
    data = {"data": own().batches(), "inputs": example}
    return secateur.prune(own().net().eval(), "params=70%", method="structural", **data).model


# Steps of training


def test_distill_is_what_one_would_call(place: Path) -> None:
    done = recipe.load(mapping(PRUNE, DISTILL)).run()
    by_hand = healing.distill(
        own().net().eval(),
        pruned(),
        own().batches(),
        eval_data=own().held_out(),
        seed=3,
        steps=6,
        lr=0.01,
        eval_every=2,
    )
    assert same(done.model, by_hand.model)
    entry = done.report["steps"][1]
    assert entry["teacher"] == "dense"
    assert entry["training"]["after"] == by_hand.report["after"]
    assert done.report["training"]
    assert done.report["plan"] == "saved"


def test_a_teacher_by_its_name_is_another_teacher(place: Path) -> None:
    recipe.load(mapping({"finetune": {"steps": 8, "lr": 0.05}}, out="taught")).run()
    (place / "teachers.py").write_text("import secateur\n\n\ndef taught():\n    return secateur.load('taught')\n")
    named = {"distill": {**DISTILL["distill"], "teacher": "teachers:taught"}}
    other = recipe.load(mapping(PRUNE, named)).run()
    assert other.report["steps"][1]["teacher"] == "teachers:taught"
    assert not same(other.model, recipe.load(mapping(PRUNE, DISTILL, out="b")).run().model)


def test_finetune_takes_a_loss_and_a_metric_of_ones_own(place: Path) -> None:
    step = {"finetune": {"steps": 3, "loss": f"{NAME}:loss", "evaluate": f"{NAME}:size", "higher_is_better": False}}
    done = recipe.load(mapping(step)).run()
    assert "loss" in own().calls
    after = done.report["steps"][0]["training"]["after"]
    assert after == pytest.approx({"size": own().size(done.model)}, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"budget": "sparsity=60%", "method": "magnitude"}, 0.6),
        ({"budget": "sparsity=60%", "method": "movement", "schedule": "linear"}, 0.6),
        ({"budget": "n:m=2:4", "method": "sr_ste", "mask_decay": 1e-3}, 0.5),
    ],
)
def test_sparsify_meets_its_budget(place: Path, options: dict[str, Any], share: float) -> None:
    step = {"sparsify": {"epochs": 2, "lr": 0.01, "only": ["mid", "fc"], "keep": "last", **options}}
    done = recipe.load(mapping(step)).run()
    entry = done.report["steps"][0]
    assert entry["sparsity"]["sparsity"] == pytest.approx(share, abs=0.01)
    model: Any = done.model
    zeros = int((model.mid.weight == 0).sum()) + int((model.fc.weight == 0).sum())
    assert zeros == entry["sparsity"]["zeros"]
    assert entry["schedule"]["end"] == 9  # three quarters of two passes over six batches
    assert done.plan is not None
    assert {name: int((~mask).sum()) for name, mask in done.plan.masks.items()}.keys() == {"mid.weight", "fc.weight"}


def test_sparsify_that_was_cut_off_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"sparsify": {"epochs": 2, "lr": 0.01, "method": "movement", "budget": "sparsity=60%", "eval_every": 2}}
    whole = recipe.load(mapping(step, out="whole")).run()
    saved, count = torch.optim.AdamW.step, 0

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > 6:
            raise KeyboardInterrupt
        return saved(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        recipe.load(mapping(step)).run()
    monkeypatch.setattr(torch.optim.AdamW, "step", saved)
    done = recipe.load(mapping(step)).run()
    assert done.report["steps"][0]["training"]["resumed"] is not None
    assert same(done.model, whole.model)


def test_a_schedule_that_does_not_fit_is_told(place: Path) -> None:
    step = {"sparsify": {"steps": 1, "end": 1.0, "method": "movement", "budget": "sparsity=60%"}}
    with pytest.raises(SecateurError, match="a run of 1 steps is too short for the schedule: it needs 2 at least"):
        recipe.load(mapping(step)).run()


# Files


def test_files_go_beside_the_model_which_goes_on_unchanged(place: Path) -> None:
    steps: tuple[dict[str, Any], ...] = (
        PRUNE,
        {"export": {}},
        {"quantize": {"mode": "static"}},
        {"adapt_batch_norm": {}},
        {"report": {}},
    )
    done = recipe.load(mapping(*steps)).run()
    assert {path.name for path in (place / "small").iterdir()} >= {"model.onnx", "model_int8.onnx", "report.md"}
    exported, quantized = done.report["steps"][1:3]
    assert exported["export"]["max_rel_error"] < 1e-3
    accuracy = quantized["quality"]["accuracy"]
    held_out: Any = own().held_out()
    assert accuracy["model"] == secateur.evaluate(pruned(), held_out)["accuracy"]
    assert quantized["bytes"]["quantized"] == (place / "small/model_int8.onnx").stat().st_size
    text = (place / "small/report.md").read_text()
    assert "| 1 | prune |" in text
    assert f"accuracy {accuracy['int8']:.4g}" in text


# Estimates


def test_a_dry_run_follows_the_budgets_and_knows_what_is_done(place: Path, say: Callable[..., str]) -> None:
    repeat = {"repeat": {"until": "params=35%", "steps": [PRUNE, DISTILL]}}
    sparse = {"prune": {"method": "magnitude", "budget": "sparsity=50%"}}
    chosen = recipe.load(mapping(repeat, sparse, {"evaluate": {}}))
    found = recipe.estimate(chosen)
    dense = sum(p.numel() for p in own().net().parameters())
    sizes = [entry["params"] / dense for entry in found["steps"]]
    assert sizes == pytest.approx([0.7, 0.7, 0.49, 0.49, 0.35, 0.35, 0.35, 0.35], abs=1e-3)
    assert 0.15 < found["steps"][6]["nonzero"] / dense < 0.2
    assert [entry["samples"] for entry in found["steps"]] == [48, 48, 48, 48, 48, 48, 48, 24]
    assert found["steps"][1]["round"] == "1 of 3"
    assert not any(entry["done"] for entry in found["steps"])
    assert not (place / "small.steps").exists()
    recipe.load(mapping(PRUNE, DISTILL)).run()
    (place / "r.yaml").write_text(recipe_text())
    text = say("run", "r.yaml", "--dry-run")
    assert "1. prune, done already" in text
    assert "2. evaluate " in text
    assert not (place / "other").exists()


def recipe_text() -> str:
    import yaml

    return yaml.safe_dump({**mapping(PRUNE, {"evaluate": {}}), "out": "small"})


# The object


def test_the_object_does_what_the_recipe_does(place: Path) -> None:
    whole = recipe.load(mapping(PRUNE, DISTILL, {"evaluate": {}}, {"export": {}})).run()
    data = {"data": own().batches(), "eval_data": own().held_out(), "inputs": torch.zeros(2, 3, 6, 6)}
    dense = own().net().eval()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    p = Pipeline(dense, seed=3, **data)
    assert p.prune(budget="params=70%", method="structural") is p
    p.distill(steps=6, lr=0.01, eval_every=2).evaluate().export(place / "p.onnx").quantize(
        place / "q.onnx", mode="static"
    )
    assert same(p.model, whole.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert [entry["step"] for entry in p.history] == ["prune", "distill", "evaluate", "export", "quantize"]
    accuracy = p.history[2]["measured"]["accuracy"]
    assert accuracy == whole.report["steps"][2]["measured"]["accuracy"]
    assert p.history[0]["data"]["calibration"] == "given batches"
    assert (place / "p.onnx").stat().st_size > (place / "q.onnx").stat().st_size
    p.save("saved", constructor=f"{NAME}:net")
    assert same(secateur.load("saved"), p.model)
    assert secateur.Plan.load(place / "saved").origin["budget"] == "params=70%"
    assert p.report["costs"]["params"]["pruned"] == sum(x.numel() for x in p.model.parameters())


def test_the_object_refuses_and_stays_as_it_was(place: Path) -> None:
    p = Pipeline(own().net().eval(), eval_data=own().held_out(), inputs=torch.zeros(2, 3, 6, 6))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: p.prune(bugdet="params=70%"), "prune has no option 'bugdet'; did you mean 'budget'?"),
        (lambda: p.distill(steps=2), "distill needs data"),
        (lambda: p.quantize("q.onnx"), "quantize takes the file of an export, and there is none"),
        (lambda: p.export("q.bin"), r"must end in \.onnx"),
        (lambda: p.prune(budget="params=70%", method="nothing"), "method: there is no 'nothing'; known"),
    ]
    for call, message in refused:
        with pytest.raises(SecateurError, match=message):
            call()
    assert p.history == []
    assert p.report["plan"] == "not saved: no step prunes"
    p.export("a.onnx").finetune(data=own().batches(), steps=1)
    with pytest.raises(SecateurError, match="the model is another one now: call export before"):
        p.quantize("q.onnx")
    assert p.finetune(data=own().batches(), steps=1, loss=own().loss, evaluate=own().size).history[-1]["options"] == {
        "data": "a list", "steps": 1, "loss": "loss", "evaluate": "size",
    }  # fmt: skip


def test_the_object_is_public_and_nothing_else_is_made_up() -> None:
    assert secateur.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = secateur.Pipelines  # type: ignore[attr-defined]
