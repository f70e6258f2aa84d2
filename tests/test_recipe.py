"""Recipes: what is refused before anything is done, with its lines; overrides; each step beside the same by hand."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur import recipe
from secateur.errors import SecateurError
from secateur.methods import METHODS
from secateur.methods.iterative import iterative
from secateur.recipe.options import options_of, typed
from secateur.recipe.read import NOT_TOLD

OWN = '''
"""A user's own network, data, training and metric."""

import torch
from torch import nn
from torch.nn import functional

built = 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.mid, self.fc = nn.Conv2d(12, 20, 3), nn.Linear(20, 4)

    def forward(self, x):
        x = self.mid(functional.relu(self.bn(self.conv(x))))
        return self.fc(functional.relu(x).mean((2, 3)))


def net():
    global built
    built += 1
    torch.manual_seed(7)
    return Net()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator)


def example():
    return {"x": torch.zeros(2, 3, 6, 6, dtype=torch.float64)}


def train(model, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            functional.cross_entropy(model(x + 0.1 * torch.randn(x.shape)), y).backward()
            optimizer.step()


def diverge(model, epochs):
    if (model.fc.weight == 0).float().mean() > 0.6:
        with torch.no_grad():
            model.fc.bias.fill_(float("nan"))


def size(model):
    return -sum(float(p.detach().abs().sum()) for p in model.parameters())


def number():
    return 5
'''
RECIPE = """\
model: own_recipe:net
inputs: {shape: [[2, 3, 6, 6]]}
data: own_recipe:batches
eval_data: own_recipe:batches
out: small
seed: 3
steps:
  - iterative:
      budget: sparsity=60%
      steps: 2
      train: own_recipe:train
      evaluate: own_recipe:size
      ignore: [fc]
  - adapt_batch_norm: {}
  - evaluate:
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the network and a recipe."""
    (tmp_path / "own_recipe.py").write_text(OWN)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_recipe", None)
    yield tmp_path
    sys.modules.pop("own_recipe", None)


def own() -> Any:
    return sys.modules["own_recipe"]


def mapping(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe for the network, of these steps."""
    head = {"model": "own_recipe:net", "out": "small", "inputs": {"shape": [[2, 3, 6, 6]]}}
    return {**head, **more, "steps": list(steps)}


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# What is done


def test_the_steps_are_those_that_one_would_write(place: Path) -> None:
    done = recipe.load("r.yaml").run()
    rows = list(own().batches())
    dense = own().net().eval()
    torch.manual_seed(3)
    found = iterative(dense, "sparsity=60%", own().train, own().size, steps=2, ignore=["fc"])
    model = copy.deepcopy(found.model)
    assert secateur.adapt_batch_norm(model, rows) == 1
    assert same(done.model, model)
    assert not same(done.model, found.model)
    assert same(secateur.load("small"), model)
    assert done.plan is not None
    assert all(torch.equal(mask, found.plan.masks[name]) for name, mask in done.plan.masks.items())
    assert secateur.Plan.load(place / "small").origin["budget"] == "sparsity=60%"

    saved = json.loads((place / "small/report.json").read_text())
    first, second, third = saved["steps"]
    assert [entry["step"] for entry in saved["steps"]] == ["iterative", "adapt_batch_norm", "evaluate"]
    for entry, other in zip(first["history"], found.history, strict=True):
        assert {**entry, "seconds": 0} == {**other, "seconds": 0}
    assert (first["metric"], first["best"], first["dense"]) == ("size", 2, found.dense)
    assert first["options"]["train"] == "own_recipe:train"
    assert (second["batch_norms_adapted"], second["samples"]) == (1, 12)
    expected = secateur.evaluate(model, rows, against=dense)
    assert third["measured"]["accuracy"] == {"dense": expected["dense_accuracy"], "pruned": expected["accuracy"]}
    assert third["measured"]["top1"] == expected["top1"]
    assert saved["measured"] == third["measured"]
    assert saved["costs"]["nonzero"]["pruned"] == sum(int(p.count_nonzero()) for p in model.parameters())
    assert (saved["plan"], saved["training"], saved["budget"]) == ("saved", True, "sparsity=60%")
    assert saved["seconds"]["total"] >= sum(entry["seconds"] for entry in saved["steps"])


def test_the_seed_decides_and_the_caller_keeps_its_own(place: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    models = [recipe.load("r.yaml", [f"seed={seed}", f"out=s{i}"]).run().model for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_one_prune_saves_its_plan_and_what_was_measured(place: Path) -> None:
    step = {"prune": {"method": "structural", "budget": ["macs=50%"], "criterion": "taylor", "limits": {"conv": 0.5}}}
    data = {"data": "own_recipe:batches", "eval_data": "own_recipe:batches", "inputs": "own_recipe:example"}
    done = recipe.load(mapping(step, **data)).run()
    by_hand = secateur.prune(
        own().net().eval(), "macs=50%", method="structural", criterion="taylor", data=list(own().batches()),
        limits={"conv": 0.5}, inputs=torch.zeros(2, 3, 6, 6), eval_data=list(own().batches()),
    )  # fmt: skip
    assert same(done.model, by_hand.model)
    entry = done.report["steps"][0]
    assert entry["costs"] == by_hand.report["costs"]
    assert done.report["measured"] == {**by_hand.report["measured"], "data": "own_recipe:batches"}
    replayed = secateur.apply(own().net().eval(), secateur.Plan.load(place / "small"), inputs=torch.zeros(2, 3, 6, 6))
    repaired: torch.nn.Module = secateur.load("small")
    assert {n: v.shape for n, v in replayed.state_dict().items()} == {
        n: v.shape for n, v in repaired.state_dict().items()
    }
    assert same(done.model, repaired)
    assert not same(replayed, repaired)  # the repair is in the result alone
    assert entry["mend"]["method"] == "least_squares"
    plain = recipe.load(mapping({"prune": {**step["prune"], "mend": "none"}}, **data), {"out": "plain"}).run()
    assert same(replayed, plain.model)
    assert "plan.json" in (place / "small/README.md").read_text()
    assert "Nothing was trained" in (place / "small/README.md").read_text()


def test_two_cuts_have_no_plan_and_the_report_says_so(place: Path) -> None:
    steps = (
        {"evaluate": {"eval_data": "own_recipe:batches"}},
        {"prune": {"method": "structural", "budget": "macs=50%"}},
        {"prune": {"method": "magnitude", "budget": "sparsity=50%"}},
    )
    done = recipe.load(mapping(*steps)).run()
    assert done.plan is None
    assert done.report["plan"] == "not saved: steps 2, 3 prune, and their plans are not joined into one"
    assert {p.name for p in (place / "small").iterdir()} == {
        *("README.md", "model.safetensors", "report.html", "report.json", "structure.json")
    }
    assert "plan.json" not in (place / "small/README.md").read_text()
    assert "measured" not in done.report  # what was measured was the dense model
    assert same(secateur.load("small"), done.model)
    sizes = [entry["size"] for entry in done.report["steps"]]
    assert sizes[0]["params"] > sizes[1]["params"] == sizes[2]["params"]
    assert sizes[2]["nonzero"] < sizes[1]["nonzero"]


def test_without_evaluate_accuracy_decides_and_what_diverges_ends_it(place: Path) -> None:
    step = {"iterative": {"budget": "sparsity=80%", "steps": 3, "schedule": "linear", "train": "own_recipe:diverge"}}
    done = recipe.load(mapping(step, eval_data="own_recipe:batches")).run()
    entry = done.report["steps"][0]
    assert entry["metric"] == "accuracy"
    assert entry["dense"] == secateur.evaluate(own().net().eval(), list(own().batches()))["accuracy"]
    assert [one["after"] is None for one in entry["history"]] == [False, False, True]
    assert entry["best"] == 2
    assert "diverged" in entry["stopped"]


def test_where_no_step_is_good_enough_nothing_is_called_a_cut(place: Path) -> None:
    texts = ["steps.1.evaluate=null", "steps.1.train=own_recipe:diverge", "steps.1.budget=sparsity=70%"]
    done = recipe.load("r.yaml", [*texts, "steps.1.steps=1", "steps.1.ignore=[]"]).run()
    assert (done.report["plan"], done.report["training"]) == ("not saved: nothing was cut", False)
    assert "no step is good enough" in done.report["steps"][0]["stopped"]
    assert not (place / "small/plan.json").exists()


def test_each_step_is_told_and_what_fails_leaves_nothing(place: Path) -> None:
    told: list[str] = []
    values = mapping(
        {"evaluate": {}}, {"adapt_batch_norm": {}}, eval_data="own_recipe:batches", data="own_recipe:number"
    )
    with pytest.raises(SecateurError, match=r"^step 2, adapt_batch_norm: data own_recipe:number returned a int"):
        recipe.load(values).run(on_step=lambda entry: told.append(entry["step"]))
    assert told == ["evaluate"]
    assert not (place / "small").exists()
    assert not list(place.glob(".*"))


def test_the_dense_model_stays_what_it_was(place: Path) -> None:
    values = mapping(
        {"adapt_batch_norm": {}}, {"evaluate": {}}, data="own_recipe:batches", eval_data="own_recipe:batches"
    )
    done = recipe.load(values).run()
    loss = done.report["measured"]["loss"]
    assert loss["dense"] == secateur.evaluate(own().net().eval(), list(own().batches()))["loss"]
    assert loss["pruned"] == secateur.evaluate(done.model, list(own().batches()))["loss"] != loss["dense"]
    assert done.report["plan"] == "not saved: no step prunes"


def test_inputs_that_are_missing_show_before_the_first_step(place: Path) -> None:
    told: list[Any] = []
    values = mapping(
        {"evaluate": {"eval_data": "own_recipe:batches"}}, {"prune": {"method": "structural", "budget": "macs=50%"}}
    )
    del values["inputs"]
    with pytest.raises(SecateurError, match=r"no Hugging Face model, and structural traces it: give .* inputs"):
        recipe.load(values).run(on_step=told.append)
    assert told == []


# What is refused


def refusal(source: Any, overrides: Any = ()) -> str:
    """The message of what must be refused, before a model is built."""
    with pytest.raises(SecateurError) as caught:
        recipe.load(source, overrides)
    assert getattr(sys.modules.get("own_recipe"), "built", 0) == 0
    return str(caught.value)


def test_all_problems_at_once_with_their_lines(place: Path) -> None:
    (place / "r.yaml").write_text(
        """\
model: own_recipe:nett
dta: own_recipe:batches
eval_data: nowhere.txt
out: own_recipe.py

steps:
  - iterative:
      budget: sparsty=60%
      steps: two
      train: own_recipe:trian
      ignore: fc
      tolerence: 0.1
  - adapt_batchnorm: {}
  - prune:
      method: structural
      criterion: taylor
      steps: 3
  - evaluate: {eval_data: self}
  - evaluate
"""
    )
    found = refusal("r.yaml", ["steps.3.keep_at_leest=0.2", "steps.6.data=x", "seed=-1", "stps.1.x=1"]).split("\n  ")
    assert found[0] == "r.yaml has 20 problems"
    starts = [
        "line 1: model 'own_recipe:nett': module 'own_recipe' has no 'nett'",
        "line 2: a recipe has no 'dta'; did you mean 'data'?",
        "line 3: nowhere.txt",
        "line 3: eval_data nowhere.txt: for own_recipe:nett give module:function",
        "line 4: own_recipe.py: is a file",
        "line 8: unknown budget measure 'sparsty'; did you mean 'sparsity'?",
        "line 9: steps must be a whole number, not 'two'",
        "line 10: train 'own_recipe:trian': module 'own_recipe' has no 'trian'; did you mean 'train'?",
        "line 11: ignore must be a list (each a text), not 'fc'",
        "line 12: iterative by magnitude has no option 'tolerence'; did you mean 'tolerance'?",
        "line 13: there is no step 'adapt_batchnorm'; did you mean 'adapt_batch_norm'?",
        "line 14: prune by structural needs budget",
        "line 14: criterion taylor needs data, here or for the whole recipe",
        "line 17: prune by structural has no option 'steps'",
        "line 18: eval_data: self would measure the model on its own words",
        "line 19: a step is a name and its options, such as 'evaluate: {}', not 'evaluate'",
        "--set steps.3.keep_at_leest: prune by structural has no option 'keep_at_leest'; did you mean 'keep_at_least'?",
        "--set seed: seed must be at least 0, not -1",
        "--set steps.6.data: there is no step '6'; they are numbered from 1 to 5",
        "--set stps.1.x: there is no 'stps' to set something in; did you mean 'steps'?",
    ]
    for line, start in zip(found[1:], starts, strict=False):
        assert line.startswith(start), f"{line!r} is not {start!r}"
    assert len(found) == 1 + len(starts)


STEP = {"iterative": {"budget": "sparsity=60%", "train": "own_recipe:train", "evaluate": "own_recipe:size"}}


def told(step: str, **options: Any) -> dict[str, Any]:
    """The step with other options; None takes one away."""
    base = STEP["iterative"] if step == "iterative" else {}
    return {step: {key: value for key, value in {**base, **options}.items() if value is not None}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model": "own_recipe:net", "out": "small"}, "the recipe, the top: a recipe needs steps"),
        (mapping(), "steps: steps must be a list of at least one step, not []"),
        (mapping({"evaluate": {}}), "steps.1.evaluate: evaluate needs eval_data, here or for the whole recipe"),
        (mapping({"adapt_batch_norm": {}}), "adapt_batch_norm needs data, here or for the whole recipe"),
        (mapping({"evaluate": 3}), "steps.1.evaluate: evaluate takes a mapping of options, not 3"),
        (mapping({"evaluate": {}, "prune": {}}), "steps.1: a step is a name and its options"),
        (mapping(told("iterative", train=None)), "iterative by magnitude needs train"),
        (mapping(told("iterative", evaluate=None)), "iterative needs evaluate, a module:function, or eval_data"),
        (
            mapping(told("iterative", evaluate=None, higher_is_better=False), eval_data="own_recipe:batches"),
            "higher_is_better: false goes with evaluate",
        ),
        (mapping(told("iterative", method="minitron")), "method: there is no 'minitron'"),
        (mapping(told("iterative", schedule="cubc")), "schedule: there is no 'cubc'; did you mean 'cubic'?"),
        (mapping(told("iterative", steps=0)), "steps must be at least 1, not 0"),
        (mapping(told("iterative", steps=True)), "steps must be a whole number, not True"),
        (mapping(told("iterative", tolerance=float("nan"))), "tolerance must be at least 0, not nan"),
        (mapping(told("iterative", tolerance="1%")), "tolerance must be a number or null, not '1%'"),
        (mapping(told("iterative", method="wanda")), "wanda needs data, here or for the whole recipe"),
        (mapping(told("iterative", batch_size=0)), "batch_size must be at least 1, not 0"),
        (mapping(told("iterative", block=[1, 2, 3])), "block must be a list of 2 (each a whole number), not [1, 2, 3]"),
        (mapping(told("iterative", budget="macs=50%")), "a budget of macs is not served by masks"),
        (mapping(told("prune", method="structural", budget="sparsity=50%")), "is for methods that mask (magnitude,"),
        (mapping(told("prune", method="structural", budget="macs=50%", limits={"conv": "x"})), "limits must be a map"),
        (mapping(told("prune", budget="params=50%")), "minitron prunes Hugging Face language models"),
        (mapping(told("prune", budget="params=50%", method=["x"])), "method must be a text, not ['x']"),
        (mapping(told("prune", budget="sparsity=50%", method="magnitude", seed=3)), "has no option 'seed'"),
        (mapping(STEP, inputs={"shape": [2, 3]}), "inputs: inputs must be a text or a mapping"),
        (mapping(STEP, inputs={"shape": [[0, 3]]}), "inputs must hold sizes of at least 1"),
        (mapping(STEP, data="self"), "data self: for own_recipe:net give module:function"),
        (mapping(STEP, data="own_recip:batches"), "data 'own_recip:batches': no module 'own_recip'"),
        (mapping(STEP, data="broken_module:x"), "importing it raised ZeroDivisionError"),
        (mapping(STEP, model="nowhere"), "model: nowhere: no such model folder"),
        (mapping(STEP, out=3), "out: out must be a path, not 3"),
        (mapping(STEP, out="."), "exists already"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_one_problem_is_one_line(place: Path, source: Any, message: str) -> None:
    text = refusal(source)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: a recipe is a mapping"),
        ("- evaluate: {}", "r.yaml: a recipe is a mapping"),
        ("model: x\nsteps: [", "r.yaml, line 2: this is no YAML"),
        ("model: x\n---\nmodel: y", "r.yaml, line 2: this is no YAML"),
        ("model: &a [*a]", "r.yaml: a value of this YAML holds itself"),
        ("model: !!python/name:os.system x", "r.yaml, line 1: this is no YAML"),
        (RECIPE + "seed: 4\n", "r.yaml, line 6: seed is given twice, at line 6 and line 16"),
        (
            RECIPE.replace("steps: 2", "steps: 2\n      steps: 3"),
            "line 10: steps is given twice, at line 10 and line 11",
        ),
    ],
)
def test_what_is_no_recipe(place: Path, text: str, message: str) -> None:
    (place / "r.yaml").write_text(text)
    assert message in refusal("r.yaml")


def test_a_recipe_that_is_not_there(place: Path) -> None:
    assert refusal("s.yaml") == "s.yaml: no such recipe; did you mean 'r.yaml'?"
    (place / "b.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "b.yaml: cannot be read as a recipe" in refusal("b.yaml")


# Values


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("steps.1.tolerance=1e-3", "tolerance", 1e-3),
        ("steps.1.tolerance=2", "tolerance", 2.0),
        ("steps.1.tolerance=", "tolerance", None),
        ("steps.1.steps=4", "steps", 4),
        ("steps.1.budget=n:m=2:4", "budget", "n:m=2:4"),
        ("steps.1.ignore=[conv, mid]", "ignore", ("conv", "mid")),
        ("steps.1.block=[1, 2]", "block", (1, 2)),
        ("steps.1.allocation={conv: 0.5}", "allocation", {"conv": 0.5}),
        ("steps.1.higher_is_better=false", "higher_is_better", False),
    ],
)
def test_overrides_are_yaml(place: Path, text: str, option: str, value: Any) -> None:
    step = recipe.load("r.yaml", [text]).steps[0]
    assert step.arguments[option] == value
    assert type(step.arguments[option]) is type(value)
    assert recipe.load("r.yaml", [text], overwrite=True).overwrite


def test_overrides_reach_everything_and_leave_the_source_alone(place: Path) -> None:
    values = mapping(STEP, {"evaluate": None})
    before = copy.deepcopy(values)
    changed = {"steps.2.eval_data": "own_recipe:batches", "inputs.shape": [[1, 3, 6, 6]], "seed": 9}
    found = recipe.load(values, changed)
    assert values == before
    assert found.steps[1].arguments == {"eval_data": "own_recipe:batches"}
    assert (found.head.inputs, found.head.seed) == ({"shape": ((1, 3, 6, 6),)}, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps.1.stpes=3", "r.yaml, --set steps.1.stpes: iterative by magnitude has no option 'stpes'; did you mean"),
        ("steps.0.steps=3", "--set steps.0.steps: there is no step '0'; they are numbered from 1 to 3"),
        ("steps.one.steps=3", "there is no step 'one'"),
        ("steps.1=3", "give an option of step 1, such as steps.1.budget"),
        ("otu=x", "r.yaml, --set otu: a recipe has no 'otu'; did you mean 'out'?"),
        ("inputs.shap=[[1]]", "r.yaml, line 2: inputs has no 'shap'; did you mean 'shape'?"),
        ("seed.x=1", "--set seed.x: seed is 3, and has no parts to set"),
        ("seed", "--set seed: must read PATH=VALUE"),
        ("seed=[", "--set seed, line 1: this is no YAML"),
        ("seed={a: 1, a: 2}", "a is given twice"),
    ],
)
def test_overrides_that_cannot_be(place: Path, text: str, message: str) -> None:
    assert message in refusal("r.yaml", [text])


def test_every_option_of_every_method_can_be_said(place: Path) -> None:
    """Its type hint is one that `typed` knows: otherwise a recipe could never say it."""
    examples: list[Any] = ["own_recipe:size", 1, 0.5, True, ["a"], [1, 1], {"a": 1}]
    for method in METHODS.values():
        for name, parameter in options_of(method, without=NOT_TOLD).items():
            fits = 0
            for example in examples:
                try:
                    typed(name, example, parameter.annotation)
                except SecateurError:
                    continue
                fits += 1
            assert 0 < fits < len(examples), f"{method.__name__}: {name}"
