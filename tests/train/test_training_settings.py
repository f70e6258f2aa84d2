"""Options of training: what is refused, and how."""

from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.train.optimize import proposed_rate
from secateur.train.settings import Distillation, Training, settings_from


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 0}, "lr must be above 0, not 0"),
        ({"lr": -1e-3}, "lr must be above 0, not -0.001"),
        ({"lr": float("nan")}, "lr must be above 0, not nan"),
        ({"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"accumulate": 0}, "accumulate must be at least 1, not 0"),
        ({"epochs": 0}, "epochs must be above 0, not 0"),
        ({"steps": 3, "tokens": "1M"}, "tokens and steps both say how long the run is: give one of them"),
        ({"tokens": "many"}, "tokens"),
        ({"clip": -1}, "clip must be at least 0, not -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"lr_end": 1.5}, "lr_end is a share of lr, between 0 and 1, not 1.5"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"lora": 0}, "lora must be at least 1, not 0"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"optimizer": "adam"}, "optimizer: there is no 'adam'; did you mean 'adamw'"),
        ({"decay": "cosin"}, "decay: there is no 'cosin'; did you mean 'cosine'"),
        ({"precision": "float16"}, "precision: there is no 'float16'"),
        ({"keep": "worst"}, "keep: there is no 'worst'"),
        ({"temperature": 0}, "temperature must be above 0, not 0"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"kl": -1}, "kl must be at least 0, not -1"),
        ({"kl": 0}, "there is nothing to learn from: kl, ce, hidden, attention are all 0"),
        ({"layers": {"a": "b"}}, "layers says what hidden and attention compare, and both are 0"),
        ({"temperatur": 2}, "training has no option 'temperatur'; did you mean 'temperature'"),
        ({"learning_rate": 2}, "training has no option 'learning_rate'"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SecateurError) as error:
        settings_from(options, Training, Distillation, others=("seq_len",))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_options_find_their_place() -> None:
    training, losses, loading = settings_from(
        {"steps": 4, "kl": 0.5, "seq_len": 8, "seed": 3}, Training, Distillation, others=("seq_len", "seed")
    )
    assert (training.steps, training.seed, losses.kl, losses.ce) == (4, 3, 0.5, 0)
    assert loading == {"seq_len": 8, "seed": 3}


def test_proposed_rates() -> None:
    assert proposed_rate(10**6, 0.3) == pytest.approx(3e-3 * 0.3)
    assert proposed_rate(16 * 10**6, 0.3) == pytest.approx(1.5e-3 * 0.3)
    assert proposed_rate(10**6, 0.9) == pytest.approx(1.5e-3)
    assert proposed_rate(10**6, 0.0) == pytest.approx(1.5e-4)
    assert 1e-4 < proposed_rate(8 * 10**9, 0.4) < 1.6e-4
