"""Repeats are unrolled when the recipe is read; what cannot be is told with its line, as all else that is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recipe_model import DISTILL, HEAD, NAME, PRUNE, mapping, module_in

from secateur import recipe
from secateur.errors import SecateurError
from secateur.recipe.repeat import rounds_until


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with module_in(tmp_path, monkeypatch) as folder:
        yield folder


def repeated(*steps: dict[str, Any], **told: Any) -> dict[str, Any]:
    return {"repeat": {**told, "steps": list(steps)}}


@pytest.mark.parametrize(
    ("share", "until", "left", "expected"),
    [
        (0.7, 0.35, 1.0, [0.7, 0.7, 0.35 / 0.49]),
        (0.7, 0.49, 1.0, [0.7, 0.7]),
        (0.7, 0.9, 1.0, [0.9]),
        (0.5, 0.25, 0.5, [0.5]),
        (0.7, 0.35, 0.3, []),
    ],
)
def test_rounds_land_on_the_share_of_the_first_model(
    share: float, until: float, left: float, expected: list[float]
) -> None:
    assert rounds_until(share, until, left) == pytest.approx(expected)


def test_times_and_until_are_unrolled(place: Path) -> None:
    found = recipe.load(mapping(repeated(PRUNE, DISTILL, times=2), {"evaluate": {}}))
    assert [(step.name, step.round) for step in found.steps] == [
        ("prune", "1 of 2"), ("distill", "1 of 2"), ("prune", "2 of 2"), ("distill", "2 of 2"), ("evaluate", ""),
    ]  # fmt: skip
    assert all(step.lands is None for step in found.steps)
    found = recipe.load(mapping(repeated(PRUNE, DISTILL, until="params=35%")))
    prunes = [step for step in found.steps if step.name == "prune"]
    assert [step.arguments["budget"] for step in prunes] == ["params=70%", "params=70%", "params=71.4286%"]
    assert [step.lands for step in prunes] == [None, None, ("params", 0.35)]
    found = recipe.load(mapping(PRUNE, repeated(PRUNE, until="params=49%")))
    assert len(found.steps) == 2


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_until_is_of_the_first_model_and_met(place: Path, measure: str) -> None:
    cut = {"prune": {"method": "structural", "budget": f"{measure}=70%", "mend": "none"}}
    done = recipe.load(mapping(repeated(cut, until=f"{measure}=40%"))).run()
    costs = [entry["costs"][measure] for entry in done.report["steps"]]
    assert len(costs) == 3
    assert 0.3 < costs[-1]["pruned"] / costs[0]["dense"] <= 0.4
    assert costs[1]["pruned"] / costs[0]["dense"] <= 0.49
    assert done.report["steps"][1]["round"] == "2 of 3"
    # The last cut is set by what the ones before have left, not by what they were asked for.
    share = 0.4 / (costs[1]["pruned"] / costs[0]["dense"])
    exact = f"params={int(0.4 * costs[0]['dense'])}" if measure == "params" else f"macs={100 * share:.6g}%"
    assert done.report["steps"][2]["options"]["budget"] == exact


def test_overrides_reach_into_a_repeat(place: Path) -> None:
    values = mapping({"evaluate": {}}, repeated(PRUNE, DISTILL, times=2))
    texts = ["steps.2.steps.1.budget=params=80%", "steps.2.times=1", "steps.2.steps.2.lr=0.5"]
    found = recipe.load(values, texts)
    assert [step.name for step in found.steps] == ["evaluate", "prune", "distill"]
    assert found.steps[1].arguments["budget"] == "params=80%"
    assert found.steps[2].arguments["lr"] == 0.5
    found = recipe.load(values, {"steps.2.times": None, "steps.2.until": "params=40%"})
    assert len(found.steps) == 7


def refusal(source: Any, overrides: Any = ()) -> str:
    with pytest.raises(SecateurError) as caught:
        recipe.load(source, overrides)
    return str(caught.value)


TWICE = mapping(repeated(PRUNE, DISTILL, times=2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (mapping({"repeat": None}), "steps.1.repeat: repeat needs steps, and times or until"),
        (mapping(repeated(PRUNE)), "steps.1.repeat: repeat needs times or until, one of them"),
        (mapping(repeated(PRUNE, times=2, until="params=50%")), "repeat needs times or until, one of them"),
        (mapping(repeated(PRUNE, times=0)), "times must be at least 1, not 0"),
        (mapping(repeated(PRUNE, time=2)), "repeat has no option 'time'; did you mean 'times'?"),
        (mapping(repeated(times=2)), "steps.1.repeat.steps: steps must be a list of at least one step, not []"),
        (mapping(repeated(repeated(PRUNE, times=2), times=2)), "a repeat holds no other repeat"),
        (mapping(repeated({"prun": {}}, times=2)), "steps.1.repeat.steps.1.prun: there is no step 'prun'; did you"),
        (mapping(repeated(PRUNE, until="params=1M")), "until: budget params=1000000 must be a percentage of params"),
        (mapping(repeated(PRUNE, until="macs=50%")), "it cuts params, and the repeat goes until macs=50%"),
        (mapping(repeated(PRUNE, PRUNE, until="params=20%")), "until needs exactly one prune within the repeat"),
        (mapping(repeated(DISTILL, until="params=20%")), "and there are 0 cuts: say times"),
        (mapping(PRUNE, repeated(PRUNE, until="params=70%")), "the steps before leave 70% already"),
        (
            mapping(repeated({"prune": {"method": "structural", "budget": "params=9k"}}, times=2)),
            "steps.1.repeat.steps.1.prune.budget: budget params=9000 must be a percentage",
        ),
        (
            mapping(repeated({"prune": {"method": "magnitude", "budget": "sparsity=50%"}}, times=2)),
            "every round must leave less",
        ),
        (
            mapping(repeated(PRUNE, {"prune": {"method": "structural", "budget": "macs=70%"}}, times=2)),
            "budgets within a repeat must be of one measure, not params and macs",
        ),
        (mapping({"quantize": {}}), "quantize takes the file of an export, and there is none: put export before"),
        (mapping({"export": {}}, PRUNE, {"quantize": {}}), "step 2, prune, changes the model after it: put export"),
        (mapping({"export": {}}, {"export": {}}), "step 1 writes model.onnx too: give another file"),
        (mapping(repeated({"export": {}}, times=2)), "step 1 writes model.onnx too: give another file"),
        (mapping({"export": {"file": "../x.onnx"}}), "file must be the plain name of an .onnx file"),
        (mapping({"export": {"format": "tflite"}}), "format: there is no 'tflite'; known: onnx"),
        (mapping({"report": {}}), "report tells of the steps before it, and there are none"),
        (mapping({"distill": {"kl": 0}}), "there is nothing to learn from"),
        (mapping({"distill": {"decay": "linaer"}}), "decay: there is no 'linaer'; did you mean 'linear'?"),
        (mapping({"distill": {"decay": 3}}), "decay must be one of linear, cosine, constant, not 3"),
        (mapping({"distill": {"steps": 3, "epochs": 2}}), "steps and epochs both say how long the run is"),
        (mapping({"distill": {"teacher": "nowhere"}}), "teacher: nowhere: no such model folder"),
        (mapping({"distill": {"temprature": 2}}), "distill has no option 'temprature'; did you mean 'temperature'?"),
        (mapping({"distill": {"seed": 2}}), "distill has no option 'seed'"),
        (mapping({"distill": {"data": {"a.txt": 0.5}}}), f"for {NAME}:net give module:function"),
        (mapping({"finetune": {"kl": 2}}), "finetune has no option 'kl'"),
        (mapping({"finetune": {"loss": f"{NAME}:los"}}), "has no 'los'; did you mean 'loss'?"),
        (
            mapping({"finetune": {"evaluate": f"{NAME}:size", "eval_data": f"{NAME}:held_out"}}),
            "evaluate and eval_data both say how good the model is: give one of them",
        ),
        (mapping({"sparsify": {}}), "sparsify by magnitude needs a budget, such as sparsity=80%"),
        (mapping({"sparsify": {"budget": "params=50%"}}), "steps.1.sparsify.budget: a budget of params"),
        (mapping({"sparsify": {"budget": "sparsity=50%", "method": "movment"}}), "method: there is no 'movment'; did"),
        (mapping({"sparsify": {"budget": "sparsity=50%", "begin": 0.8}}), "begins at 0.8 of the run and ends at 0.75"),
        (mapping({"sparsify": {"budget": "sparsity=50%", "end": 2}}), "end is a share of the run, between 0 and 1"),
        (mapping({"export": {}}, {"quantize": {"mode": "static"}}, data=None), "mode static needs data to calibrate"),
        (mapping({"export": {}}, {"quantize": {"ranges": "minmax"}}), "ranges are found by calibration: say mode"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
def test_what_is_refused(place: Path, source: Any, message: str) -> None:
    (place / "a.txt").write_text("words")
    text = refusal(source)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps.1.steps.3.budget=1", "there is no step '3' of that repeat; they are numbered from 1 to 2"),
        ("steps.1.steps.1=1", "give an option of step 1, such as steps.1.budget"),
        ("steps.1.steps.1.bugdet=1", "prune by structural has no option 'bugdet'; did you mean 'budget'?"),
    ],
)
def test_overrides_in_a_repeat_that_cannot_be(place: Path, text: str, message: str) -> None:
    assert message in refusal(TWICE, [text])


def test_lines_within_a_repeat(place: Path) -> None:
    (place / "r.yaml").write_text(
        f"""\
model: {HEAD["model"]}
out: small
inputs: {{shape: [[2, 3, 6, 6]]}}
data: {HEAD["data"]}
steps:
  - repeat:
      times: two
      steps:
        - prune: {{method: structural, budget: params=70%}}
        - distill:
            stps: 3
  - quantize: {{}}
"""
    )
    found = refusal("r.yaml").split("\n  ")
    assert found[0] == "r.yaml has 3 problems"
    starts = [
        "line 7: times must be a whole number or null",
        "line 11: distill has no option 'stps'",
        "line 12: quantize",
    ]
    assert all(line.startswith(start) for line, start in zip(found[1:], starts, strict=True))
