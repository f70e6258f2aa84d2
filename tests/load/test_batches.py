"""Batches of every form: how many samples, how they reach the model, how they are taken apart."""

from typing import Any

import pytest
import torch
from small_nets import Residual, pictures, shaken
from tiny import tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import is_pair, output_of, run, samples_of, size_of
from secateur.load.functions import call, find_function


class Two(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.weight * (x - y)


def test_every_form_reaches_the_model() -> None:
    net, x = shaken(Residual()), pictures(3)
    y = torch.zeros(3, dtype=torch.long)
    assert torch.equal(run(net, x), run(net, (x, y)))
    a, b = torch.full((2,), 5.0), torch.full((2,), 2.0)
    assert run(Two(), {"x": a, "y": b, "labels": a}).tolist() == [3.0, 3.0]
    assert run(Two(), ((a, b), torch.zeros(2))).tolist() == [3.0, 3.0]
    assert run(Two(), ({"x": a, "y": b}, torch.zeros(2))).tolist() == [3.0, 3.0]
    model = tiny("llama", dtype=torch.float32)
    result = run(model, tokens())
    assert result.past_key_values is None
    assert torch.equal(output_of(model, {"input_ids": tokens()}), result.logits)


def test_samples() -> None:
    x, y = pictures(3), torch.arange(3)
    assert (size_of(x), size_of((x, y)), size_of({"scale": torch.tensor(2.0), "x": x})) == (3, 3, 3)
    for i, sample in enumerate(samples_of((x, y))):
        assert is_pair(sample)
        assert torch.equal(sample[0], x[i : i + 1])  # type: ignore[index]
        assert sample[1].tolist() == [i]  # type: ignore[index]
    parts: Any = samples_of({"a": x, "b": y, "flag": True})
    assert [(p["b"].item(), p["flag"], p["a"].shape[0]) for p in parts] == [(0, True, 1), (1, True, 1), (2, True, 1)]
    assert len(samples_of(x)) == 3
    ragged = {"a": x, "b": torch.zeros(5)}
    assert samples_of(ragged) == [ragged], "the tensors do not agree on how many there are"


def test_what_is_no_batch() -> None:
    with pytest.raises(SecateurError, match="a batch of type dict holds no tensor"):
        size_of({"a": 1})
    with pytest.raises(SecateurError, match="not 3 things"):
        run(Two(), (torch.zeros(1),) * 3)
    with pytest.raises(SecateurError, match=r"returns a tuple, not logits: give a loss"):
        output_of(nn.LSTM(3, 4), torch.zeros(2, 5, 3))


def test_functions_of_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "own_functions.py").write_text(
        "def good():\n    return 7\ndef bad():\n    raise KeyError('x')\nn = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert call("own_functions:good", "--inputs", "a:b") == 7
    for spec, message in {
        "own_functions": r"--inputs 'own_functions' must read module:function, such as a:b",
        "own_functions:god": "module 'own_functions' has no 'god'; did you mean 'good'",
        "own_functions:n": "'n' is int, not a function",
        "own_functons:good": "no module 'own_functons'",
        "own_functions:bad": "--inputs 'own_functions:bad' raised KeyError: 'x'",
    }.items():
        with pytest.raises(SecateurError, match=message):
            call(spec, "--inputs", "a:b")
    assert find_function("own_functions:good", "x", "a:b")() == 7
