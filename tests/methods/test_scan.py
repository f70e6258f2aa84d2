"""Every number of a scan is that of a model that is cut by hand and run in full; fewer blocks run for it."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Mlp, Residual, pairs, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from secateur.choose.allocate import read_allocation, shares
from secateur.choose.plan import Plan
from secateur.choose.rank import keep_best
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.load.batches import run
from secateur.load.model import fingerprint
from secateur.measure.harm import Harm
from secateur.methods import scan, scan_plot
from secateur.methods.scan import sensitivity
from secateur.methods.scan_result import Sensitivity
from secateur.methods.verbs import prune
from secateur.score.reads import activation
from secateur.score.weights import magnitude
from secateur.space.weights import maskable

IDS = list(torch.split(tokens(6, 10), 2))


class Stage(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, stream: int, inside: int) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(stream, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside)
        self.two = nn.Conv2d(inside, stream, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.two(functional.relu(self.bn(self.one(x))))
        return result


class Cnn(nn.Module):
    """A stem, three stages in a list, and a head of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(Stage(8, inside) for inside in (6, 7, 9)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.stages(functional.relu(self.stem(x))).mean((2, 3)))


def bert(layers: int) -> Any:
    sizes = {"hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 3, "intermediate_size": 20}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, num_labels=4, max_position_embeddings=16, **sizes)
    return shaken(BertForSequenceClassification(config), dtype=torch.float64)


def sentences() -> list[dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(2)
    ids = torch.randint(60, (6, 8), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.randint(4, (6,), generator=drawn)
    return [
        {"input_ids": ids[i : i + 3], "attention_mask": mask[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3)
    ]


def case(name: str, layers: int = 3) -> tuple[Any, list[Any]]:
    if name == "cnn":
        return shaken(Cnn(), dtype=torch.float64), pairs((4, 3), dtype=torch.float64)
    if name == "bert":
        return bert(layers), sentences()
    if name == "gemma2":
        return tiny("gemma2"), IDS
    return tiny("llama", num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4), IDS


# --- the slow way ---


def logs(model: Any, batches: Sequence[Any]) -> torch.Tensor:
    """Log probabilities [predictions, classes], in float64: of a language model without the last position."""
    with torch.no_grad():
        found = [getattr(out, "logits", out) for out in (run(model, batch) for batch in batches)]
    rows = [x[:, :-1].flatten(0, 1) if x.dim() == 3 else x for x in found]
    return functional.log_softmax(torch.cat(rows).double(), -1)


def told(model: Any, dense: Any, batches: Sequence[Any]) -> dict[str, float]:
    """How much worse by KL, loss and accuracy, from the definitions."""
    own, whole = logs(model, batches), logs(dense, batches)
    if isinstance(batches[0], torch.Tensor):
        targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    else:
        targets = torch.cat([b["labels"] if isinstance(b, dict) else b[1] for b in batches])
    kl = (whole.exp() * (whole - own)).sum(1).mean()
    hits = (whole.argmax(1) == targets).double().mean() - (own.argmax(1) == targets).double().mean()
    loss = functional.nll_loss(own, targets) - functional.nll_loss(whole, targets)
    return {"kl": float(kl), "loss": float(loss), "accuracy": float(hits)}


def thinned(model: nn.Module, name: str, ratio: float) -> nn.Module:
    """A copy with the smallest elements of one weight at zero."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        flat = dict(new.named_parameters())[name].view(-1)
        flat[flat.abs().argsort()[: math.ceil(ratio * flat.numel() - 1e-9)]] = 0
    return new


def near(value: float) -> Any:
    return pytest.approx(value, rel=2e-4, abs=3e-6)


@pytest.mark.parametrize("name", ["llama", "cnn", "bert"])
def test_every_number_is_that_of_a_model_cut_by_hand(name: str) -> None:
    model, batches = case(name, layers=2)
    before = fingerprint(model)
    found = sensitivity(model, batches, ratios=(0.6, 0.3))
    assert fingerprint(model) == before
    assert found.cost["blocks"] == (3 if name == "cnn" else 2)
    inputs = None if name in ("llama", "bert") else batches[0][0][:2]
    space = discover(model, inputs)
    both = {
        "kl": {"losses": found.losses, "axes": {n: a["losses"] for n, a in found.axes.items()}, "blocks": found.blocks}
    }
    tables = {**both, **found.also}
    assert list(tables) == (["kl", "loss"] if name == "llama" else ["kl", "loss", "accuracy"])

    assert set(found.losses) == {w.name for w in maskable(model, inputs)}
    for weight in found.losses:
        for text in ("0.3", "0.6"):
            true = told(thinned(model, weight, float(text)), model, batches)
            assert {m: t["losses"][weight][text] for m, t in tables.items()} == {m: near(true[m]) for m in tables}

    assert {a.name for a in space.axes if a.kind != "head_dim"} == set(found.axes)
    for axis in found.axes:
        entry = found.axes[axis]
        score = activation if entry["criterion"] == "activation" else lambda m, s, _, a: magnitude(m, s, a)
        units = score(model, space, batches, [space.axis(axis)])[axis]
        for text, kept in list(entry["kept"].items())[:1]:
            plan = Plan({axis: keep_best(space.axis(axis), units, kept)})
            true = told(apply(model, plan, space=space, inputs=inputs), model, batches)
            assert {m: t["axes"][axis][text] for m, t in tables.items()} == {m: near(true[m]) for m in tables}

    assert set(found.blocks) == {block.name for block in space.blocks}
    for block in found.blocks:
        true = told(apply(model, Plan(dropped=(block,)), space=space, inputs=inputs), model, batches)
        assert {m: t["blocks"][block] for m, t in tables.items()} == {m: near(true[m]) for m in tables}


def test_layers_of_several_types_are_dropped_too() -> None:
    model, batches = case("gemma2")
    found = sensitivity(model, batches, what=["blocks"], only=["layers"])
    assert len(found.blocks) == 2
    for block, loss in found.blocks.items():
        assert loss == near(told(apply(model, Plan(dropped=(block,))), model, batches)["kl"])


def test_wanda_ranks_within_rows_by_what_a_weight_reads() -> None:
    model, batches = case("cnn")
    found = sensitivity(model, batches, ratios=[0.5], what=["weights"], masks="wanda", only=["fc"])
    read = torch.cat([functional.relu(model.stem(x)) for x, _ in batches])
    size = model.stages(read).mean((2, 3)).square().sum(0).sqrt()
    new = copy.deepcopy(model)
    with torch.no_grad():
        order = (new.fc.weight.abs() * size).argsort(1)[:, :4]
        new.fc.weight.scatter_(1, order, 0.0)
    assert found.losses == {"fc.weight": {"0.5": near(told(new, model, batches)["kl"])}}
    assert found.masks == "wanda"


def test_alps_mends_what_it_thins_out() -> None:
    model, batches = case("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    options: dict[str, Any] = {"ratios": [0.6], "what": ["weights"]}
    every = sensitivity(model, batches, masks="alps", **options)
    alone = sensitivity(model, batches, masks="alps", only=[name], **options)
    assert every.losses[name] == near_all(alone.losses[name])
    pruned = prune(model, "sparsity=60%", method="alps", data=batches, only=[name], iterations=300)
    assert alone.losses[name]["0.6"] == near(told(pruned.model, model, batches)["kl"])
    assert alone.losses[name]["0.6"] < sensitivity(model, batches, only=[name], **options).losses[name]["0.6"]


def near_all(values: Any) -> Any:
    return pytest.approx(values, rel=2e-4, abs=3e-6)


# --- what it costs ---


def test_kept_activations_change_nothing_and_save_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case("llama")
    calls = 0
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    ran = {}
    results = {}
    for reuse in (True, False):
        calls = 0
        results[reuse] = sensitivity(model, batches, ratios=(0.2, 0.5, 0.8), what=["weights"], reuse=reuse)
        ran[reuse] = calls / (3 * len(batches))
    assert results[True].losses == results[False].losses  # to the last bit
    assert results[True].cost["passes"] == pytest.approx(ran[True])
    assert results[False].cost["passes"] == pytest.approx(ran[False])
    assert results[True].cost["naive"] == pytest.approx(ran[False])
    assert ran[True] < 0.75 * ran[False]
    assert results[True].cost["measurements"] == 3 * 21


def test_what_runs_through_the_whole_model_costs_full_passes() -> None:
    model, batches = case("llama")
    whole = sensitivity(model, batches, ratios=[0.5], what=["axes"], only=["hidden"])
    none = sensitivity(model, batches, ratios=[0.5], what=["axes"], only=["hidden"], reuse=False)
    assert whole.cost["passes"] > whole.cost["naive"] == pytest.approx(none.cost["passes"])  # the chain was looked for


def test_outputs_that_are_not_kept_are_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case("cnn")
    kept = sensitivity(model, batches, ratios=[0.5], what=["weights"])

    def forgetful(*args: Any, **kwargs: Any) -> Harm:
        return Harm(*args, limit_bytes=100, **kwargs)

    monkeypatch.setattr(scan, "Harm", forgetful)
    again = sensitivity(model, batches, ratios=[0.5], what=["weights"])
    assert again.losses == kept.losses
    assert again.cost["passes"] == pytest.approx(kept.cost["passes"] + again.cost["measurements"])
    assert again.cost["naive"] == pytest.approx(kept.cost["naive"] + again.cost["measurements"])


def test_models_without_a_chain_are_measured_all_the_same() -> None:
    model, batches = shaken(Residual(), dtype=torch.float64), pairs(dtype=torch.float64)
    found = sensitivity(model, batches, ratios=[0.5])
    assert found.cost["blocks"] == 0
    name = "second.weight"
    assert found.losses[name]["0.5"] == near(told(thinned(model, name, 0.5), model, batches)["kl"])


# --- what comes out ---


def test_units_are_rounded_and_at_least_one_goes() -> None:
    model = tiny("llama", num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    found = sensitivity(model, IDS[:1], ratios=(0.1, 0.4, 0.5, 0.95), what=["axes"], ignore=["hidden"])
    kept = {entry["kind"]: entry["kept"] for entry in found.axes.values()}
    assert kept["ffn"] == {"0.1": 72, "0.4": 48, "0.5": 40, "0.95": 4}
    assert kept["kv_groups"] == {"0.1": 2, "0.4": 2, "0.5": 1, "0.95": 1}
    assert kept["heads"] == dict.fromkeys(("0.1", "0.4", "0.5", "0.95"), 3)  # one of two in each group
    assert found.cost["measurements"] == 4 + 2 + 1  # the same units are not measured twice


def test_other_models_are_measured_by_their_outputs() -> None:
    model = shaken(Mlp(), dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sensitivity(model, x, ratios=[0.5], inputs=x[:2], what=["axes", "weights"], batch_size=6)
    assert (found.measure, list(found.also)) == ("mse", [])
    with torch.no_grad():
        dense, own = model(x), thinned(model, "mid.weight", 0.5)(x)
    error = (own - dense).square().sum() / (dense - dense.mean()).square().sum()
    assert found.losses["mid.weight"]["0.5"] == near(float(error))


def test_the_measure_is_the_users_and_the_others_stand_beside() -> None:
    model, batches = case("cnn")
    by_kl = sensitivity(model, batches, ratios=[0.5])
    by_accuracy = sensitivity(model, batches, ratios=[0.5], measure="accuracy")
    assert by_accuracy.measure == "accuracy"
    assert by_accuracy.losses == by_kl.also["accuracy"]["losses"]
    assert by_accuracy.also["kl"]["blocks"] == by_kl.blocks
    assert set(by_kl.dense) == {"kl", "loss", "accuracy"}
    order = [loss["0.5"] for _, loss in by_kl.worst()]
    assert order == sorted(order, reverse=True)
    assert by_kl.worst("blocks")[0][1]["1"] == max(by_kl.blocks.values(), default=0) if by_kl.blocks else True


def test_two_runs_are_equal_and_the_file_comes_back(tmp_path: Path) -> None:
    model, batches = case("llama")
    runs = [sensitivity(model, batches, ratios=[0.5], only=["*.1.*"], name="m", data_name="d") for _ in range(2)]
    one, other = (run.to_json() for run in runs)
    for told_of in (one, other):
        told_of["cost"].pop("seconds")
    assert one == other
    path = runs[0].save(tmp_path / "deep" / "s.json")
    assert Sensitivity.load(path) == runs[0]
    assert json.loads(path.read_text())["format"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["s.json"]
    with pytest.raises(SecateurError, match="exists already"):
        runs[0].save(path)
    runs[0].save(path, overwrite=True)
    path.write_text(json.dumps({**one, "format": 9}))
    with pytest.raises(SecateurError, match="format 9, and this version reads 1"):
        Sensitivity.load(path)
    path.write_text("{}")
    with pytest.raises(SecateurError, match="is no sensitivity file"):
        runs[0].save(path, overwrite=True)


def test_allocation_takes_the_file_and_spares_what_is_sensitive(tmp_path: Path) -> None:
    model, batches = case("cnn")
    found = sensitivity(model, batches, what=["weights"])
    path = found.save(tmp_path / "s.json")
    weights = maskable(model, batches[0][0][:2]).chosen
    given = shares(weights, 0.5, read_allocation(str(path)))

    def expected(of: dict[str, float]) -> float:
        curves = {n: [0.0, *loss.values()] for n, loss in found.losses.items()}
        grid = torch.linspace(0, 0.75, 4, dtype=torch.float64)
        return sum(float(interpolated(grid, torch.tensor(curves[n]), s)) for n, s in of.items())

    assert expected(given) < expected(dict.fromkeys(given, 0.5))
    pruned = prune(model, "sparsity=50%", method="magnitude", inputs=batches[0][0][:2], allocation=str(path))
    total = sum(w.size for w in weights)
    zeros = sum(int((dict(pruned.model.named_parameters())[w.name] == 0).sum()) for w in weights)
    assert zeros == math.ceil(total / 2)


def interpolated(at: torch.Tensor, values: torch.Tensor, x: float) -> torch.Tensor:
    place = min(int(torch.searchsorted(at, x, right=True)) - 1, len(at) - 2)
    part = (x - at[place]) / (at[place + 1] - at[place])
    return values[place] + part * (values[place + 1] - values[place])


# --- going on ---


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case("cnn")
    partial = tmp_path / "s.json.partial"
    whole = sensitivity(model, batches, ratios=[0.5])
    values, left = Harm.values, 9

    def killed(self: Harm, *args: Any) -> dict[str, float]:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return values(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Harm, "values", killed)
        with pytest.raises(KeyboardInterrupt):
            sensitivity(model, batches, ratios=[0.5], partial=partial)
    done = len(partial.read_text().splitlines()) - 1
    assert 0 < done < whole.cost["measurements"]
    with partial.open("a") as file:
        file.write('{"key": "weight fc.we')  # the power went
    found = sensitivity(model, batches, ratios=[0.5], partial=partial)
    assert found.cost["resumed"] == done
    one, other = whole.to_json(), found.to_json()
    assert one.pop("cost")["passes"] == pytest.approx(other.pop("cost")["passes"])
    assert one == other
    assert len(partial.read_text().splitlines()) == 1 + whole.cost["measurements"]

    more = sensitivity(model, batches, ratios=[0.5, 0.7], measure="loss", partial=partial)
    assert more.cost["resumed"] == whole.cost["measurements"]  # other ratios and measures add to it
    with pytest.raises(SecateurError, match="whose data differ; delete it"):
        sensitivity(model, batches[:1], partial=partial)
    with pytest.raises(SecateurError, match="whose masks differ; delete it"):
        sensitivity(model, batches, masks="wanda", partial=partial)
    with partial.open("a") as file:
        file.write('{"key": 3}\n')
    with pytest.raises(SecateurError, match=r"is damaged, \{'key': 3\} is no measurement; delete it"):
        sensitivity(model, batches, partial=partial)
    partial.write_text("something else\n")
    with pytest.raises(SecateurError, match="no state of a stopped scan"):
        sensitivity(model, batches, partial=partial)


# --- which, and what is refused ---


def test_patterns_choose_axes_weights_and_blocks() -> None:
    model, batches = case("llama")
    found = sensitivity(model, batches[:1], ratios=[0.5], only=["model.layers.1"], ignore=["hidden", "attention"])
    assert set(found.axes) == {f"model.layers.1.{n}" for n in ("mlp.ffn", "self_attn.heads", "self_attn.kv_groups")}
    assert all(name.startswith("model.layers.1.") for name in found.losses)
    assert set(found.blocks) == {"model.layers.1", "model.layers.1.mlp"}
    kinds = sensitivity(tiny("gpt2"), batches[:1], ratios=[0.5], only=["ffn", "head_dim"])
    assert {entry["kind"] for entry in kinds.axes.values()} == {"ffn", "head_dim"}
    assert not kinds.losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [0.5, 1.0]}, "ratios: 1 is not between 0 and 1"),
        ({"ratios": [0.0]}, "ratios: 0 is not between 0 and 1"),
        ({"ratios": [0.5, 0.5]}, "ratios: 0.5 is given twice"),
        ({"ratios": []}, "ratios: give at least one"),
        ({"only": ["*.mpl.*"]}, "only: '\\*.mpl.\\*' matches no kind, axis, weight or block"),
        ({"ignore": ["fnn"]}, "ignore: 'fnn' matches no .* did you mean 'ffn'"),
        ({"what": ["weights"], "only": ["ffn"]}, "only: 'ffn' matches no"),
        ({"only": ["ffn"], "ignore": ["ffn"]}, "in both only and ignore"),
        ({"only": ["ffn"], "ignore": ["model"]}, "none of the axes and weights and blocks of .* is left"),
        ({"what": ["units"]}, "what: 'units' cannot be measured"),
        ({"measure": "accuracy"}, "measure accuracy is for classifiers, and this is a language model"),
        ({"measure": "mse"}, "measure mse cannot be told .* kl, loss"),
        ({"criterion": "tailor"}, "no criterion 'tailor'; did you mean 'taylor'"),
        ({"masks": "wonda"}, "no masks 'wonda'; did you mean 'wanda'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        sensitivity(tiny("llama"), IDS[:1], **options)


def test_data_that_does_not_fit_is_refused() -> None:
    model, batches = case("cnn")
    with pytest.raises(SecateurError, match="Cnn does not run on the"):
        sensitivity(model, [(torch.zeros(2, 4, 6, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(SecateurError, match="targets of the data are 0 to 7, and the model knows 5"):
        sensitivity(model, [(batches[0][0], torch.tensor([0, 7, 1, 2]))])
    with pytest.raises(SecateurError, match="measure loss cannot be told"):
        sensitivity(model, [pictures(2, dtype=torch.float64)], measure="loss")


# --- the picture ---


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_heat_map_is_drawn(kind: str, tmp_path: Path) -> None:
    model, batches = case("llama")
    found = sensitivity(model, batches[:1], ratios=[0.5], name="tiny")
    path = found.plot(tmp_path / f"map.{kind}")
    begin = path.read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") if kind == "png" else b"<?xml" in begin
    weights, structure = scan_plot.grids(found).values()
    assert weights["model.layers.1"]["mlp.up_proj"] == found.losses["model.layers.1.mlp.up_proj.weight"]["0.5"]
    assert structure["model.layers.1"]["ffn"] == found.axes["model.layers.1.mlp.ffn"]["losses"]["0.5"]
    assert structure["model.layers.1"]["dropped"] == found.blocks["model.layers.1"]
    assert structure["model.layers.1"]["mlp dropped"] == found.blocks["model.layers.1.mlp"]
    assert structure["whole model"]["hidden"] == found.axes["hidden"]["losses"]["0.5"]
    with pytest.raises(SecateurError, match="exists already"):
        found.plot(path)
    with pytest.raises(SecateurError, match=r"a plot is a \.png or \.svg file"):
        found.plot(tmp_path / "map.pdf")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[report\]'"):
        scan_plot.check_plot(tmp_path / "a.png")
