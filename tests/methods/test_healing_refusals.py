"""What distilling and fine-tuning refuse, in one line that names the thing."""

from pathlib import Path
from typing import Any

import heal
import pytest
import torch
from torch import nn

from secateur import distill, finetune
from secateur.errors import SecateurError


def student(**options: Any) -> Any:
    return heal.llama(seed=4, intermediate_size=12, **options)


def high() -> torch.Tensor:
    ids = heal.rows(8)
    ids[3, 3] = 48
    return ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"student": student(vocab_size=40)}, "a vocabulary of 48 and the student one of 40: both need one tokenizer"),
        ({"data": None}, "there is no data to train on: give data"),
        ({"data": []}, "the data has no batch"),
        ({"data": {}}, "there is no data to train on: the mapping of sources is empty"),
        ({"data": heal.rows(0)}, "the data has 0 rows, fewer than one batch of 4"),
        ({"data": high()}, "data: its tokens are 3 to 48, and the model knows 0 to 47: it is of another tokenizer"),
        ({"data": {"a": (high(), 1.0)}}, "a: its tokens are"),
        ({"data": {"a": (heal.rows(), 0.7), "b": (heal.rows(9, 5), 0.3)}}, "rows of [8] and of [5]: for tokens, give"),
        (
            {"data": {"a": (heal.rows(), 0.7), "b": (heal.rows(), -0.3)}},
            "the weight of b must be a number above 0, not",
        ),
        ({"data": {"a": (heal.rows(), float("inf"))}}, "the weight of a must be a number above 0, not inf"),
        ({"data": heal.padded(heal.rows())}, "the weight of input_ids must be a number above 0, not 'Tensor'"),
        ({"data": "there is no such file.txt"}, "there is no such file.txt"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"lr": 0}, "lr must be above 0, not 0"),
        ({"eval_data": []}, "the data has no batch"),
        ({"patience": 2}, "patience needs evaluations: give eval_data"),
        ({"hidden": 1.0, "layers": {"model.layers.0": "model.layers.9"}}, "the teacher has no module"),
        ({"attention": 1.0, "layers": {"model.norm": "model.norm"}}, "attention: layers must end in numbers"),
        ({"teacher_dtype": "float8"}, "float8"),
        ({"teacher": None}, "give the teacher, or a cache of its logits"),
        ({"student": heal.half_masked(heal.llama()), "lora": 2}, "14 weights of the model are masked"),
        ({"step": 4}, "training has no option 'step'; did you mean 'steps'"),
        ({"tokens": "1M"}, "tokens and steps both say how long the run is"),
    ],
)
def test_what_distilling_refuses(options: dict[str, Any], says: str) -> None:
    given = {
        "teacher": heal.llama(),
        "student": student(),
        "data": heal.rows(8),
        "steps": 2,
        "batch_size": 4,
        **options,
    }
    with pytest.raises(SecateurError) as error:
        distill(given.pop("teacher"), given.pop("student"), given.pop("data"), **given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def bare(model: Any, batch: Any) -> Any:
    return model(batch[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"tokens": "1k", "steps": None},
            "tokens: these batches are no token rows of one length: give steps or epochs",
        ),
        ({"loss": bare}, "the loss must be one number that depends on the model, not shape [4, 5]"),
        ({"wandb": "prunes"}, "Weights & Biases is not installed"),
        ({"evaluate": lambda m: 1.0, "eval_data": [heal.pictures()]}, "give one of them"),
        ({"patience": 1}, "patience needs evaluations: give eval_data"),
        ({"evaluate": lambda m: float("nan")}, "on held-out data is nan"),
        ({"data": "text.txt"}, "Net has no config to read token data for: pass batches"),
        ({"data": [torch.ones(4, 3, 5, 5)]}, "must be a pair (inputs, targets), or give a loss"),
        ({"eval_data": [torch.ones(4, 3, 5, 5)]}, "there is nothing to evaluate by"),
        ({"model": heal.net().bfloat16(), "sparse": True}, "half precision"),
    ],
)
def test_what_finetuning_refuses(options: dict[str, Any], says: str) -> None:
    from secateur.train import Constant, sparsify

    given = {"model": heal.net(), "data": heal.loader(), "steps": 2, **options}
    model = given.pop("model")
    if given.pop("sparse", False):
        given["sparsity"] = sparsify(model, "sparsity=50%", schedule=Constant())
    with pytest.raises(SecateurError) as error:
        finetune(model, given.pop("data"), **given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_models_of_other_forms() -> None:
    with pytest.raises(SecateurError, match="gives 5 numbers for each prediction and the student 4"):
        distill(heal.net(), heal.net(classes=4), heal.loader(), steps=1)
    with pytest.raises(SecateurError, match="attention: Net is no Hugging Face model: leave that loss out"):
        distill(heal.net(), heal.net(), heal.loader(), steps=1, attention=1.0)
    with pytest.raises(SecateurError, match="ce needs targets"):
        distill(heal.llama(), student(), [{"inputs_embeds": torch.ones(2, 4, 16)}], steps=1, ce=1.0)
    with pytest.raises(SecateurError, match="no parameter of the model takes gradients"):
        finetune(heal.net().requires_grad_(requires_grad=False), heal.loader(), steps=1)


def test_a_run_goes_on_only_as_it_was(tmp_path: Path) -> None:
    def given(**options: Any) -> dict[str, Any]:
        return {"steps": 3, "lr": 0.01, "batch_size": 4, "work": tmp_path, "eval_data": heal.rows(4, seed=9), **options}

    distill(heal.llama(), student(), heal.rows(12), **given())
    for changed, says in (
        ({"teacher": heal.llama(seed=7)}, "teacher"),
        ({"student": heal.llama(seed=8)}, "model"),
        ({"data": heal.rows(12, seed=7)}, "data"),
        ({"lr": 0.02}, "lr"),
        ({"temperature": 2.0}, "temperature"),
        ({"eval_data": heal.rows(4, seed=8)}, "held_out"),
        ({"seed": 3}, "seed"),
    ):
        other: dict[str, Any] = {
            **given(),
            "teacher": heal.llama(),
            "student": student(),
            "data": heal.rows(12),
            **changed,
        }
        with pytest.raises(SecateurError, match=f"holds a run that was cut off, with {says}"):
            distill(other.pop("teacher"), other.pop("student"), other.pop("data"), **other)
    again = distill(heal.llama(), student(), heal.rows(12), **given())
    assert again.report["resumed"] == 3


@pytest.mark.parametrize("changed", [{"batch_size": 3}, {"share": 2.0}])
def test_a_run_goes_on_only_in_the_same_order(changed: dict[str, Any], tmp_path: Path) -> None:
    def run(batch_size: int = 4, share: float = 1.0) -> None:
        data: Any = {"a": (heal.rows(12), 1.0), "b": (heal.rows(12, seed=6), share)}
        distill(heal.llama(), student(), data, steps=2, lr=0.01, batch_size=batch_size, work=tmp_path)

    run()
    with pytest.raises(SecateurError, match="with order "):
        run(**changed)


def test_outputs_that_are_no_tensor() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> str:
            return "no tensor"

    with pytest.raises(SecateurError, match="the model returns a str, of which no tensor can be compared"):
        distill(Odd(), Odd(), [torch.ones(2, 2)], steps=1)
