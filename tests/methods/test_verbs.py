"""The public verbs pass on how data is read, and name what they do not know."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny, tokens

import secateur
from secateur import SecateurError


class Letters:
    """A tokenizer of single letters."""

    bos_token_id = None
    eos_token_id = 2

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        del add_special_tokens, verbose
        return [ord(letter) % 256 for letter in text]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", dtype=torch.float32)


def test_the_text_field_reaches_the_reader(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"body": f"some words, number {i}, and more of them"}) + "\n" for i in range(9)))
    reading: dict[str, Any] = {"tokenizer": Letters(), "seq_len": 16, "text_field": "body"}
    plan = secateur.plan(model, {"intermediate_size": 40}, data=path, **reading)
    assert {len(kept.units) for kept in plan.kept.values()} == {40}
    assert secateur.evaluate(model, path, **reading)["perplexity"] > 1
    with pytest.raises(SecateurError, match="body"):
        secateur.plan(model, {"intermediate_size": 40}, data=path, tokenizer=Letters(), seq_len=16)


def test_unknown_options_are_named(model: Any) -> None:
    with pytest.raises(SecateurError, match="minitron has no option 'text_feild'; did you mean 'text_field'"):
        secateur.plan(model, {"intermediate_size": 40}, data=tokens(), text_feild="body")
    with pytest.raises(SecateurError, match="evaluate has no option 'sample'; did you mean 'samples'"):
        secateur.evaluate(model, tokens(), sample=3)
