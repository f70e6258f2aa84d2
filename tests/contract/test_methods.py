"""What every method must pass, on every kind of model: one test matrix for the whole table."""

import inspect
import json
import math
import os
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
from tiny import logits, tiny, tokens

from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint, load_model, quiet_transformers
from secateur.methods import MASKING, METHODS
from secateur.methods.verbs import Result, plan, prune
from secateur.ship import save
from secateur.space.weights import maskable

DATA = tokens(4, 12)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "dtype": torch.float32},
    "gpt2": {"dtype": torch.bfloat16},
    "gemma2": {"dtype": torch.float32},
}
SHARE = 0.85
SPARSITY = 0.4
REPAIRING = ("sparsegpt", "alps")
"""Methods that change the weights that stay."""
QUICK: dict[str, dict[str, Any]] = {
    "minitron": {"top_k": 2, "score_samples": 2, "divisors": {"hidden": 12, "layers": 1}, "max_depth_cut": 0.0},
    "structural": {"only": ("ffn",), "round_to": 8},
    "flap": {"only": ("ffn",)},
    "gradnas": {"only": ("ffn",), "uniform": True},
    "fastnas": {"only": ("ffn",), "round_to": 8, "levels": 2},
    "depth": {"proposals": 1},
    "search": {"levels": 5, "probes": 1, "trials": 8},
    "obs": {"levels": 5},
}
"""Options that keep a method quick; a method that is not here is run with its defaults."""

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    written = model.generate(ids[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    torch.save({"logits": logits, "written": written, "tied": head.data_ptr() == embedding.data_ptr(),
                "params": sum(p.numel() for p in model.parameters())}, folder + "/fresh.pt")
assert not any(name.split(".")[0] == "secateur" for name in sys.modules), "secateur was imported"
"""


@dataclass(frozen=True)
class Case:
    """A dense model in a folder, and what a method made of it."""

    method: str
    name: str
    dense: Any
    before: str
    result: Result
    out: Path

    @property
    def pruned(self) -> Any:
        return self.result.model


def budget_for(method: str) -> str:
    return f"sparsity={100 * SPARSITY:g}%" if method in MASKING else f"params={100 * SHARE:g}%"


def run(method: str, dense: Any) -> Result:
    return prune(dense, budget_for(method), method=method, data=DATA, batch_size=2, **QUICK.get(method, {}))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case]:
    """All methods on all models, saved, and loaded in one process that knows nothing of us."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("contract")
    found = {}
    for name, options in MODELS.items():
        with quiet_transformers():
            tiny(name, **options).save_pretrained(base / name)
        for method in METHODS:
            dense, _, source = load_model(base / name)
            before = fingerprint(dense)
            result = run(method, dense)
            out = base / f"{name}-{method}"
            save(result.model, out, plan=result.plan, source=source, report=result.report)
            found[method, name] = Case(method, name, dense, before, result, out)
    torch.save(DATA, base / "ids.pt")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(base / "ids.pt"), *(str(case.out) for case in found.values())]
    done = subprocess.run(command, cwd=base, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(params=[(method, name) for method in METHODS for name in MODELS], ids="-".join)
def case(request: pytest.FixtureRequest, cases: dict[tuple[str, str], Case]) -> Case:
    return cases[request.param]


def test_the_model_is_bitwise_untouched(case: Case) -> None:
    assert fingerprint(case.dense) == case.before
    assert all(p.requires_grad and p.grad is None for p in case.dense.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.dense.modules())


def test_the_budget_is_met_exactly_counted(case: Case) -> None:
    dense, after = (sum(p.numel() for p in m.parameters()) for m in (case.dense, case.pruned))
    assert case.result.report["costs"]["params"] == {"dense": dense, "pruned": after}
    if case.method not in MASKING:
        assert after <= SHARE * dense
        return
    weights = [w.name for w in maskable(case.dense)]
    total = sum(case.dense.get_parameter(n).numel() for n in weights)
    zeros = sum(int((case.pruned.get_parameter(n) == 0).sum()) for n in weights)
    assert zeros == math.ceil(SPARSITY * total)  # no weight of the dense models is zero
    assert case.result.report["sparsity"]["masked"] == {"elements": total, "zeros": zeros}
    others = [n for n, _ in case.dense.named_parameters() if n not in weights]
    assert all(torch.equal(case.pruned.get_parameter(n), case.dense.get_parameter(n)) for n in others)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_decides_the_same_again(method: str, cases: dict[tuple[str, str], Case]) -> None:
    case = cases[method, "llama"]
    options = QUICK.get(case.method, {})
    again = plan(case.dense, budget_for(method), method=case.method, data=DATA, batch_size=2, **options)
    assert (again.kept, again.dropped) == (case.result.plan.kept, case.result.plan.dropped)
    assert {n: m.tolist() for n, m in again.masks.items()} == {n: m.tolist() for n, m in case.result.plan.masks.items()}


def test_the_saved_plan_makes_the_same_model(case: Case) -> None:
    saved = Plan.load(case.out)
    replayed = apply(case.dense, saved)
    if case.method in REPAIRING:  # a plan says what goes; what repair made of the rest is in the weights alone
        for name, mask in saved.masks.items():
            assert torch.equal(replayed.get_parameter(name), case.dense.get_parameter(name) * mask)
            assert bool((case.pruned.get_parameter(name)[~mask] == 0).all())
        assert fingerprint(replayed) != fingerprint(case.pruned)
    elif case.result.report.get("mend", {}).get("weights"):
        shapes = ({n: p.shape for n, p in m.named_parameters()} for m in (replayed, case.pruned))
        assert next(shapes) == next(shapes)
        assert fingerprint(replayed) != fingerprint(case.pruned)
    else:
        assert fingerprint(replayed) == fingerprint(case.pruned)
    assert Plan.load(case.out).origin["method"] == case.method
    assert Plan.load(case.out).origin["fingerprint"] == case.before


def test_a_fresh_process_with_stock_transformers_has_the_same_logits(case: Case) -> None:
    fresh = torch.load(case.out / "fresh.pt", weights_only=True)
    assert torch.equal(fresh["logits"], logits(case.pruned, DATA))
    assert fresh["written"].shape == (4, 7)
    assert fresh["params"] == sum(p.numel() for p in case.pruned.parameters())
    assert not torch.equal(fresh["logits"], logits(case.dense, DATA))


def test_dtype_and_ties_are_kept(case: Case) -> None:
    assert [p.dtype for p in case.pruned.parameters()] == [MODELS[case.name]["dtype"]] * len(
        [*case.pruned.parameters()]
    )
    dense, pruned = (
        m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (case.dense, case.pruned)
    )
    assert dense is True  # all three are tied
    assert pruned is True
    assert torch.load(case.out / "fresh.pt", weights_only=True)["tied"] is True
    assert json.loads((case.out / "config.json").read_text())["dtype"] == str(MODELS[case.name]["dtype"])[6:]


def test_the_report_is_json_and_names_the_method(case: Case) -> None:
    report = json.loads((case.out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["method"] == case.method
    assert report["budget"] == budget_for(case.method)
    assert report["seconds"]["total"] > 0
    assert report["data"] == {"calibration": "given batches"}


def test_modes_and_frozen_parameters_are_kept(case: Case) -> None:
    assert case.pruned.training is False
    assert all(p.requires_grad for p in case.pruned.parameters())


# The table


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_names_the_nearest(method: str) -> None:
    known = next(n for n, p in inspect.signature(METHODS[method]).parameters.items() if p.kind is p.KEYWORD_ONLY)
    model = tiny("llama", device="meta")
    with pytest.raises(SecateurError, match=f"{method} has no option '{known}x'; did you mean '{known}'"):
        plan(model, "params=70%", method=method, data=DATA, **{f"{known}x": 1})


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(SecateurError, match="there is no method 'minitrn'; did you mean 'minitron'"):
        plan(tiny("llama", device="meta"), "params=70%", method="minitrn", data=DATA)


@pytest.mark.parametrize("method", METHODS)
def test_the_signature_is_the_options_schema(method: str) -> None:
    function = METHODS[method]
    assert function.__name__ == method
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    first = list(signature.parameters.values())[:3]
    assert [p.name for p in first] == ["model", "budget", "data"]
    rest = list(signature.parameters.values())[3:]
    assert rest, "a method has options"
    for parameter in rest:
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter.name} must be keyword-only"
        assert parameter.default is not parameter.empty, f"{parameter.name} must have a default"
        assert not isinstance(parameter.default, list | dict | set), f"{parameter.name} has a mutable default"
        assert hints[parameter.name] is not Any
    assert set(signature.parameters) <= set(hints)


@pytest.mark.parametrize("method", METHODS)
def test_the_docstring_tells_of_every_option(method: str) -> None:
    docs = docstring_parser.parse(METHODS[method].__doc__ or "")
    told = {p.arg_name: p.description for p in docs.params}
    assert list(told) == list(inspect.signature(METHODS[method]).parameters)
    assert all(told.values())
    assert any(r.type_name == "SecateurError" for r in docs.raises)
    module = inspect.getmodule(METHODS[method])
    assert module is not None
    assert module.__name__ == f"secateur.methods.{method}"
    assert "arXiv" in (module.__doc__ or "") or "http" in (module.__doc__ or ""), "a method cites its paper"
