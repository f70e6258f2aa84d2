"""What was measured once is found again, under everything that it depends on."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, tiny, tokens

from secateur.choose.search import Grid
from secateur.errors import SecateurError
from secateur.measure.quality import Batch
from secateur.methods import study as module
from secateur.methods.study import Study
from secateur.progress import quiet
from secateur.score.cache import Cache
from secateur.space import Space, discover

DATA = [tokens(2, 9, seed=1), tokens(2, 9, seed=2)]
GRID = Grid({"ffn": 24, "layers": 3}, {"ffn": [24, 12], "layers": [3, 2]})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", dtype=torch.float32, num_hidden_layers=3, hidden_size=16, intermediate_size=24)


@pytest.fixture(scope="module")
def space(model: Any) -> Space:
    return discover(model)


def study(
    model: Any, space: Space, folder: Path | None = None, data: Sequence[Batch] = DATA, samples: int = 3
) -> Study:
    return Study(model, space, data, samples, Cache(folder), quiet)


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whatever measures is a failure."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("activation_scores", "probe_kinds", "drop_layers"):
        monkeypatch.setattr(module, name, never)


def test_rows_are_the_first_ones_and_end_inside_a_batch(model: Any, space: Space) -> None:
    rows = study(model, space, samples=3).rows
    assert [len(r) for r in rows] == [2, 1]
    assert torch.equal(torch.cat([r for r in rows if isinstance(r, torch.Tensor)]), torch.cat(DATA)[:3])
    assert [len(r) for r in study(model, space, samples=99).rows] == [2, 2]
    named = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in DATA]
    cut = study(model, space, data=named, samples=1).rows
    assert [{k: v.shape for k, v in r.items()} for r in cut if isinstance(r, dict)] == [
        {"input_ids": (1, 9), "attention_mask": (1, 9)}
    ]


def test_no_data_and_no_samples_are_errors(model: Any, space: Space) -> None:
    with pytest.raises(SecateurError, match="there is no calibration data"):
        study(model, space, data=[])
    with pytest.raises(SecateurError, match="score_samples must be at least 1, not 0"):
        study(model, space, samples=0)


def test_kl_is_measured_on_the_rows_alone(model: Any, space: Space) -> None:
    other = tiny("llama", dtype=torch.float32, num_hidden_layers=3, hidden_size=16, intermediate_size=24, seed=1)
    p, q = (logits(m, torch.cat(DATA)[:3]).double()[:, :-1].log_softmax(-1) for m in (model, other))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert study(model, space).kl(other) == pytest.approx(expected, rel=1e-4)
    assert study(model, space).kl(model) == pytest.approx(0, abs=1e-6)


def test_a_second_study_measures_nothing(
    model: Any, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study(model, space, tmp_path)
    scores = first.scores(layers=True, presorted=False)
    sensitivity = first.sensitivity(scores, GRID, presorted=False)
    assert len(list(tmp_path.iterdir())) == 3
    no_work(monkeypatch)
    second = study(copy.deepcopy(model), space, tmp_path)
    again = second.scores(layers=True, presorted=False)
    assert again.axes.keys() == scores.axes.keys()
    assert all(torch.equal(again.axes[name], score) for name, score in scores.axes.items())
    assert (again.blocks, again.samples, again.tokens) == (scores.blocks, scores.samples, scores.tokens)
    assert second.sensitivity(again, GRID, presorted=False) == sensitivity
    assert "reference" not in vars(second)  # not even the dense model ran


def test_without_a_cache_everything_is_measured_again(
    model: Any, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(model, space).scores(layers=False, presorted=False)
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="measured again"):
        study(model, space).scores(layers=False, presorted=False)


def changed(model: Any, what: str) -> Any:
    other = copy.deepcopy(model)
    if what == "one weight":
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight[0, 0] += 2**-20
    elif what == "dtype":
        other = other.double()
    else:
        other.config.rms_norm_eps *= 2
    return other


@pytest.mark.parametrize("what", ["one weight", "dtype", "config"])
def test_another_model_is_another_key(
    model: Any, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    study(model, space, tmp_path).scores(layers=True, presorted=False)
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="measured again"):
        study(changed(model, what), space, tmp_path).scores(layers=True, presorted=False)


@pytest.mark.parametrize(
    "data",
    [[DATA[0]], [DATA[1], DATA[0]], [DATA[0], DATA[1].clone().fill_(7)], [torch.cat(DATA)], [d[:, :-1] for d in DATA]],
    ids=["fewer", "another order", "another token", "other batches", "shorter rows"],
)
def test_other_data_is_another_key(
    model: Any, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[torch.Tensor]
) -> None:
    study(model, space, tmp_path).scores(layers=True, presorted=False)
    no_work(monkeypatch)
    with pytest.raises(AssertionError, match="measured again"):
        study(model, space, tmp_path, data).scores(layers=True, presorted=False)


def test_other_options_are_another_key(
    model: Any, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study(model, space, tmp_path)
    scores = first.scores(layers=True, presorted=False)
    first.sensitivity(scores, GRID, presorted=False)
    no_work(monkeypatch)
    finer = Grid(GRID.dense, {**GRID.choices, "ffn": [24, 18, 12]})
    deeper = Grid(GRID.dense, {**GRID.choices, "layers": [3, 2, 1]})
    fewer = study(model, space, tmp_path, samples=2)
    with pytest.raises(AssertionError, match="measured again"):
        first.sensitivity(scores, finer, presorted=False)
    with pytest.raises(AssertionError, match="measured again"):
        first.sensitivity(scores, deeper, presorted=False)
    with pytest.raises(AssertionError, match="measured again"):
        first.sensitivity(scores, GRID, presorted=True)
    with pytest.raises(AssertionError, match="measured again"):
        fewer.sensitivity(scores, GRID, presorted=False)
    with pytest.raises(AssertionError, match="measured again"):
        first.scores(layers=False, presorted=False)


def test_the_version_and_the_device_are_in_the_key(
    model: Any, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = study(model, space, tmp_path).identity
    assert {"model", "data", "rows", "device", "secateur", "torch"} <= set(identity)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert study(model, space, tmp_path).identity != identity


def test_sorted_models_are_not_scored(model: Any, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    no_work(monkeypatch)
    scores = study(model, space).scores(layers=False, presorted=True)
    assert (scores.samples, scores.tokens, scores.blocks) == (0, 0, {})
    for axis in space.axes:
        if axis.kind in ("hidden", "ffn", "kv_groups"):
            assert scores.axes[axis.name].tolist() == list(range(axis.size, 0, -1))
        if axis.kind == "heads":
            assert scores.axes[axis.name].tolist() == [2, 1, 2, 1]


def test_layers_of_sorted_models_are_measured_all_the_same(model: Any, space: Space) -> None:
    scores = study(model, space).scores(layers=True, presorted=True)
    measured = study(model, space).scores(layers=True, presorted=False)
    assert scores.blocks == pytest.approx(measured.blocks)
    assert scores.axes["model.layers.0.mlp.ffn"].tolist() == list(range(24, 0, -1))


def test_time_is_told(model: Any, space: Space) -> None:
    timed = study(model, space)
    timed.scores(layers=False, presorted=False)
    assert list(timed.seconds) == ["scoring"]
    before = timed.seconds["scoring"]
    with timed.timed("scoring"):
        pass
    assert timed.seconds["scoring"] > before > 0
