"""Models of a user's own code: saved as what builds them, what was cut, and the tensors; and nothing but."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.cut.record import describe
from secateur.errors import SecateurError
from secateur.load.constructor import build
from secateur.load.modeling_secateur import SizedAttention, replay
from secateur.ship import load, save
from secateur.space import discover

NETS = '''
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class Mlp(nn.Module):
    def __init__(self, width=24, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(6, width, bias=bias), nn.Linear(width, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Buffers of both kinds, a tie, a parametrised layer, a recurrent one, and numbers that forward reads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv, self.norm = nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.mixed = weight_norm(nn.Linear(12, 10))
        self.lstm = nn.LSTM(10, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.linspace(0, 1, 12).float(), persistent=False)
        self.width, self.shape = 12, (12, 1)

    def forward(self, ids):
        x = self.norm(self.conv(self.table(ids).transpose(1, 2)))
        x = (x.reshape(-1, self.width, ids.shape[1]) + self.offset.view(self.shape)).transpose(1, 2)
        return self.head(self.lstm(self.mixed(x))[0])


def stack(layers=3):
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6 + i), nn.Tanh(), nn.Linear(6 + i, 6)) for i in range(layers)))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)


calls = 0


def moody():
    global calls
    calls += 1
    return stack(2 + calls)


class Stateful(Mlp):
    def get_extra_state(self):
        return {"any": "thing"}


needs_values = lambda: nn.Linear(6, int(torch.ones(4).sum()))
'''


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with nets.py, which is the working directory."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("nets", None)


def scatter(model: nn.Module) -> Any:
    """Every tensor away from its initial value; running statistics positive."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model.eval()


def narrowed(model: Any) -> Any:
    """The net with 9 of 12 channels and 7 of 10 mixed units, as surgery leaves it."""
    new = copy.deepcopy(model)
    keep, mixed = torch.tensor([0, 1, 2, 4, 5, 7, 8, 10, 11]), torch.tensor([0, 2, 3, 4, 6, 8, 9])
    for owner, name, dim, units in [
        *((new.conv, name, 0, keep) for name in ("weight", "bias")),
        *((new.norm, name, 0, keep) for name in ("weight", "bias", "running_mean", "running_var")),
        (new, "offset", 0, keep),
        (new.mixed.parametrizations.weight, "original1", 1, keep),
        *((new.mixed.parametrizations.weight, f"original{i}", 0, mixed) for i in (0, 1)),
        (new.mixed, "bias", 0, mixed),
        (new.lstm, "weight_ih_l0", 1, mixed),
    ]:
        old = getattr(owner, name)
        part = old.detach().index_select(dim, units)
        setattr(owner, name, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)
    new.conv.out_channels = new.norm.num_features = new.width = 9
    new.shape = (9, 1)
    new.mixed.in_features, new.mixed.out_features, new.lstm.input_size = 9, 7, 7
    return new


def half(model: nn.Module, inputs: torch.Tensor, name: str = "input") -> tuple[nn.Module, Plan]:
    space = discover(model, {name: inputs})
    plan = Plan({a.name: Kept(a.kind, a.size, tuple(range(0, a.size, 2))) for a in space.axes})
    assert plan.kept
    return apply(model, plan, space=space, inputs={name: inputs}), plan


def test_a_cut_model_comes_back_in_another_process(tmp_path: Path) -> None:
    inputs = torch.randn(4, 6)
    model, plan = half(scatter(build("nets:Mlp", {"width": 30, "bias": False})), inputs, "x")
    out = save(model, tmp_path / "out", plan=plan, constructor="nets:Mlp", arguments={"width": 30, "bias": False})
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "plan.json", "plan.safetensors", "structure.json"}
    code = "import secateur, torch; m = secateur.load('out'); torch.save(m(torch.load('x.pt')), 'y.pt')"
    torch.save(inputs, "x.pt")
    env = {**os.environ, "PYTHONPATH": str(Path(sys.modules["secateur"].__file__ or "").parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load("y.pt"), model(inputs))
    assert Plan.load(out) == plan


def test_every_sort_of_tensor_and_number_comes_back(tmp_path: Path) -> None:
    ids = torch.arange(10).view(2, 5)
    model = narrowed(scatter(build("nets:Net")))
    save(model, tmp_path / "out", constructor="nets:Net")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "head.weight" not in stored
    assert "offset" in stored
    again: Any = load(tmp_path / "out")
    assert torch.equal(again(ids), model(ids))
    assert again.head.weight is again.table.weight
    assert (again.width, again.shape, again.norm.num_features, again.lstm.input_size) == (9, (9, 1), 9, 7)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in again.modules())
    again.train()(ids).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert torch.equal(load(tmp_path / "out", dtype="float64")(ids).float(), model.double()(ids).float())


def test_a_root_sequential(tmp_path: Path) -> None:
    inputs = torch.randn(4, 6)
    model, _ = half(scatter(build("nets:stack")), inputs)
    save(model, tmp_path / "out", constructor="nets:stack")
    assert torch.equal(load(tmp_path / "out")(inputs), model(inputs))


def test_an_attention_with_fewer_heads_than_its_input_has(tmp_path: Path) -> None:
    inputs = torch.randn(2, 5, 16)
    model: Any = scatter(build("nets:encoder"))
    part = SizedAttention.of(model.layers[1].self_attn)
    rows = torch.cat([torch.arange(8) + start for start in (0, 16, 32)])  # two of four heads of q, k and v
    part.in_proj_weight, part.in_proj_bias = (
        nn.Parameter(tensor.detach()[rows]) for tensor in (part.in_proj_weight, part.in_proj_bias)
    )
    part.out_proj.weight = nn.Parameter(part.out_proj.weight.detach()[:, :8])
    part.num_heads, part.out_proj.in_features = 2, 8
    model.layers[1].self_attn = part
    save(model, tmp_path / "out", constructor="nets:encoder")
    again: Any = load(tmp_path / "out")
    assert type(again.layers[0].self_attn) is nn.MultiheadAttention
    assert torch.equal(again(inputs), model(inputs))
    save(again, tmp_path / "again", constructor="nets:encoder")
    assert torch.equal(load(tmp_path / "again")(inputs), model(inputs))


def test_layers_that_are_left_of_a_root_sequential() -> None:
    dense: Any = build("nets:stack", {"layers": 4})
    model = nn.Sequential(dense[1], dense[3], nn.Identity())
    structure = describe(model, dense, {"": [1, 3, 0]})
    assert structure["layers"] == {"": [1, 3, 0]}
    assert structure["modules"] == {"2": "identity"}
    again: Any = build("nets:stack", {"layers": 4})
    replay(again, json.loads(json.dumps(structure)))
    assert [[p.shape for p in part.parameters()] for part in again] == [
        [p.shape for p in part.parameters()] for part in model
    ]


def test_a_dense_model_has_an_empty_record(tmp_path: Path) -> None:
    for constructor in ("nets:Net", "nets:needs_values"):
        model = scatter(build(constructor))
        save(model, tmp_path / "out", constructor=constructor, overwrite=True)
        content = json.loads((tmp_path / "out/structure.json").read_text())
        assert not any(content["structure"].values())
        again = load(tmp_path / "out")
        ours, theirs = dict(model.named_buffers()), dict(again.named_buffers())
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tie_that_the_constructor_does_not_make(tmp_path: Path) -> None:
    model: Any = scatter(build("nets:stack"))
    model[1][0].weight, model[2][2].bias = model[0][0].weight, model[0][2].bias
    model[1][0].out_features = 6
    model[1][0].bias, model[1][2].weight = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6, 6))
    save(model, tmp_path / "out", constructor="nets:stack")
    again: Any = load(tmp_path / "out")
    assert again[1][0].weight is again[0][0].weight
    assert again[2][2].bias is again[0][2].bias
    untied: Any = scatter(build("nets:Net"))
    untied.head.weight = nn.Parameter(torch.randn(11, 8))
    save(untied, tmp_path / "untied", constructor="nets:Net")
    again = load(tmp_path / "untied")
    assert torch.equal(again.head.weight, untied.head.weight)
    assert torch.equal(again.table.weight, untied.table.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Mlp is no Hugging Face model; say what builds the dense model: constructor='module:callable'"),
        ({"arguments": {}}, "arguments are those of a constructor, and none is given"),
        ({"constructor": "nets:Mlp", "arguments": {"width": {1}}}, "are stored as JSON, and cannot be"),
        ({"constructor": "nets:Nlp"}, "no 'Nlp'; did you mean 'Mlp'"),
        ({"constructor": "nets:stack"}, r"up is a Linear, and nothing in the dense model: that cannot be recorded"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=message):
        save(build("nets:Mlp"), tmp_path / "new/out", **options)
    with pytest.raises(SecateurError, match="the model keeps extra state"):
        save(build("nets:Stateful"), tmp_path / "new/out", constructor="nets:Stateful")
    with torch.device("meta"):
        empty = build("nets:Mlp")
    with pytest.raises(SecateurError, match=r"on the meta device: up\.weight has no values"):
        save(empty, tmp_path / "new/out", constructor="nets:Mlp")
    with pytest.raises(SecateurError, match=r"the model of nets:moody is not the one that was saved: 3\.0\.weight"):
        save(build("nets:stack"), tmp_path / "new/out", constructor="nets:moody")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("nn.Linear(width, 3)", "nn.Linear(width, 4)", r"down\.weight is \[3, 12\] in the file and \[4, 12\]"),
        ("        self.up, self.down", "        self.top, self.down", "cannot be cut as recorded"),
        ("nn.Linear(width, 3)", "nn.Linear(width, 3, bias=False)", "it has no tensor down.bias"),
        ("nn.Linear(width, 3)", "nn.Sequential(nn.Linear(width, 3))", r"down\.0\.weight is missing in the file"),
        ("        super().__init__()\n        self.up", "        1 / 0\n        self.up", "raised ZeroDivisionError"),
        ("class Mlp(nn.Module)", "Mlp = 3\nclass Gone(nn.Module)", "'nets:Mlp' is a int, and nothing that can"),
    ],
)
def test_code_that_changed_is_an_error(before: str, after: str, message: str, tmp_path: Path) -> None:
    model, _ = half(build("nets:Mlp"), torch.randn(4, 6), "x")
    save(model, tmp_path / "out", constructor="nets:Mlp")
    (tmp_path / "nets.py").write_text(NETS.partition("class Stateful")[0].replace(before, after, 1))
    del sys.modules["nets"]
    with pytest.raises(SecateurError, match=message):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("structure.json", "{", r"structure\.json: cannot be read"),
        ("structure.json", '{"format": 2}', r"structure\.json: this is no structure of format 1"),
        ("structure.json", '{"format": 1, "constructor": "nets:Mlp"}', r"structure\.json: damaged"),
        ("model.safetensors", "nothing", r"model\.safetensors: no readable safetensors file"),
        ("model.safetensors", None, r"model\.safetensors: no such file"),
    ],
)
def test_a_damaged_folder_is_an_error(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    save(build("nets:Mlp"), tmp_path / "out", constructor="nets:Mlp")
    if content is None:
        (tmp_path / "out" / file).unlink()
    else:
        (tmp_path / "out" / file).write_text(content)
    with pytest.raises(SecateurError, match=message):
        load(tmp_path / "out")


def test_an_old_result_is_replaced_when_asked(tmp_path: Path) -> None:
    out = save(build("nets:Mlp"), tmp_path / "out", constructor="nets:Mlp", report={"method": "x"})
    assert "secateur.load(" in (out / "README.md").read_text()
    with pytest.raises(SecateurError, match="exists already"):
        save(build("nets:stack"), out, constructor="nets:stack")
    save(build("nets:stack"), out, constructor="nets:stack", overwrite=True)
    assert isinstance(load(out), nn.Sequential)
