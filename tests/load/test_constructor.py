"""Models from ``module:callable``, and their weights: what goes wrong is said, and what is right is built."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from secateur.errors import SecateurError
from secateur.load.constructor import build, load_weights

CODE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        import own_helper
        self.up, self.down = nn.Linear(3, width), nn.Linear(width, 2)

    @classmethod
    def large(cls):
        return cls(9)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


model = Net()
number = 3


def text():
    return "no model"


def fails():
    raise KeyError("a\\nb")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_code.py").write_text(CODE)
    (tmp_path / "own_helper.py").write_text("")
    (tmp_path / "own_broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "own_raising.py").write_text("raise RuntimeError('no luck')")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_what_is_named_is_built() -> None:
    path = list(sys.path)
    built: Any = build("own_code:Net", {"width": 7})
    assert built.up.out_features == 7
    large: Any = build("own_code:Net.large")
    assert large.up.out_features == 9
    assert isinstance(build("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("own_code", None, "'own_code' must have the form module:callable"),
        (":Net", None, "must have the form module:callable"),
        ("own_kode:Net", None, "there is no module 'own_kode' here"),
        ("own_code.py:Net", None, r"there is no module 'own_code\.py' here.*give it without \.py"),
        ("own_broken:Net", None, "module 'own_broken' needs 'nowhere_to_be_found', which is not installed"),
        ("own_raising:Net", None, "importing 'own_raising' raised RuntimeError: no luck"),
        ("own_code:Nett", None, "module 'own_code' has no 'Nett'; did you mean 'Net'"),
        ("own_code:Net.lage", None, "'Net' of 'own_code' has no 'lage'; did you mean 'large'"),
        ("own_code:number", None, "is a int, and nothing that can be called"),
        ("own_code:model", None, "is a model already; name a function or class that builds it"),
        ("own_code:text", None, "returned a str, which is no torch.nn.Module"),
        ("own_code:fails", None, "raised KeyError: 'a.*b'"),
        ("own_code:Net", {"widht": 3}, r"the arguments \['widht'\] do not fit: got an unexpected keyword"),
        ("own_code:Net", {"width": "x"}, "raised TypeError"),
    ],
)
def test_what_goes_wrong_is_said(spec: str, arguments: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message) as caught:
        build(spec, arguments)
    assert "\n" not in str(caught.value)
    assert "constructor" in str(caught.value)


def test_weights_are_loaded_whole(tmp_path: Path) -> None:
    model, other = build("own_code:Net"), build("own_code:Net")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tied, again = build("own_code:Tied"), build("own_code:Tied")
    save_model(tied, str(tmp_path / "tied.safetensors"))
    load_weights(again, tmp_path / "tied.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(tied.parameters(), again.parameters(), strict=True))


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = build("own_code:Net")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    tied = {name: tensor.clone() for name, tensor in build("own_code:Tied").state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    for number, (content, message) in enumerate(
        [
            ({k: v for k, v in state.items() if not k.startswith("up")}, r"lacks up\.weight and 1 more of the Net"),
            ({**state, "extra": torch.zeros(1)}, "the Net has no extra"),
            ({**state, "up.weight": torch.zeros(9, 3)}, r"up\.weight is \[9, 3\] in the file and \[4, 3\] in the Net"),
            ({f"model.{k}": v for k, v in state.items()}, r"lacks up\.weight and 3 more.*did you mean 'model\.up"),
        ]
    ):
        save_file(content, tmp_path / f"{number}.safetensors")
        with pytest.raises(SecateurError, match=message):
            load_weights(model, tmp_path / f"{number}.safetensors")
    for name, message in [
        ("weights.pt", "no readable safetensors file .*pickles are not read"),
        ("nothing", "no such file"),
        (".", "is a folder"),
    ]:
        with pytest.raises(SecateurError, match=message):
            load_weights(model, tmp_path / name)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    tied["b.weight"] += 1
    save_file(tied, tmp_path / "untied.safetensors")
    with pytest.raises(SecateurError, match=r"a\.weight and b\.weight differ, and they are one tensor in the Tied"):
        load_weights(build("own_code:Tied"), tmp_path / "untied.safetensors")
