"""Every plain model of the zoo can be made, from its name too, and gives finite outputs."""

import importlib
import inspect
from typing import Any

import plain_models
import pytest
import torch
from plain_models import FILES, MODELS
from torch.utils import _pytree


def run(name: str) -> list[Any]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    assert not model.training
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_and_gives_finite_outputs(name: str) -> None:
    first = run(name)
    assert first
    assert all(bool(torch.isfinite(output).all()) for output in first)
    # Without this, an oracle that compares two runs would see their noise.
    assert all(torch.equal(a, b) for a, b in zip(first, run(name), strict=True))


def test_every_constructor_is_found_by_its_name() -> None:
    for name, spec in MODELS.items():
        module, _, function = spec.constructor.partition(":")
        constructor = getattr(importlib.import_module(module), function)
        assert constructor is getattr(plain_models, name)
        assert not inspect.signature(constructor).parameters
        assert constructor().state_dict().keys() == spec.make().state_dict().keys()


def test_no_model_hides_another() -> None:
    assert sum(len(file.TABLE) for file in FILES) == len(MODELS)
