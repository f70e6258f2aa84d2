"""The cost model of docs/scale.md: its terms are counts times sizes, and it is near what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost_model as model  # noqa: E402

SMALL = model.Shape("small", 4, 1024, 4096, 8192, 1024, 1024)
LARGE = replace(SMALL, name="large", layers=8)
WORK = model.Work("wanda", tokens=2048, batch=256, length=128)
EVERY = [replace(WORK, method=method, mend=mend) for method in model.METHODS for mend in (False, True)]
SECONDS, PEAK, READ = 2.0, 1.5, 1.15
"""Factors within which predictions lie, as docs/scale.md says."""


def test_parameters_are_those_of_the_models_that_the_table_names() -> None:
    counts = {shape.name.split(",")[0]: shape.params / 1e9 for shape in model.SHAPES}
    assert counts == pytest.approx(
        {"0.1B": 0.134, "1B": 1.5, "8B": 8.03, "70B": 70.6, "405B": 405.8, "1T": 1042}, rel=0.03
    )
    assert SMALL.params == 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096) + 2 * 1024 * 8192
    assert SMALL.weights == 2 * SMALL.params


@pytest.mark.parametrize("work", EVERY, ids=lambda w: f"{w.method}-{w.mend}")
@pytest.mark.parametrize("way", ["streamed", "memory"])
def test_more_takes_more(work: model.Work, way: str) -> None:
    told = model.estimate(SMALL, work, model.HERE, way)
    for more in (
        model.estimate(LARGE, work, model.HERE, way),
        model.estimate(SMALL, replace(work, tokens=4096), model.HERE, way),
    ):
        assert more.total > told.total
        assert all(more.seconds[name] >= seconds for name, seconds in told.seconds.items())
        assert more.disk >= told.disk
    assert told.total == sum(told.seconds.values()) > 0
    assert told.peak == sum(told.memory.values()) > model.HERE.program
    assert all(value >= 0 for part in (told.seconds, told.memory, told.read, told.written) for value in part.values())


@pytest.mark.parametrize("work", EVERY, ids=lambda w: f"{w.method}-{w.mend}")
def test_streamed_memory_knows_no_layers_and_no_tokens(work: model.Work) -> None:
    told = model.estimate(SMALL, work, model.HERE)
    assert model.estimate(LARGE, work, model.HERE).peak == told.peak
    assert model.estimate(SMALL, replace(work, tokens=1 << 20), model.HERE).peak == told.peak
    deep = replace(SMALL, layers=1000)  # the batch that shows how blocks follow is there at every block
    more = (
        model.estimate(deep, work, model.HERE).peak - model.estimate(replace(deep, layers=900), work, model.HERE).peak
    )
    assert more == 100 * 3 * 256 * 1024 * 2
    assert (
        model.estimate(LARGE, work, model.HERE, "memory").peak > model.estimate(SMALL, work, model.HERE, "memory").peak
    )


def test_units() -> None:
    once = model.flops(SMALL, replace(WORK, tokens=1))["passes"]
    assert once == 2 * 4 * (2 * SMALL.block + 4 * 128 * 1024)  # two passes, two operations for each element met
    told = model.estimate(SMALL, WORK, model.HERE)
    faster = model.estimate(SMALL, WORK, replace(model.HERE, forward=2 * model.HERE.forward))
    assert faster.seconds["passes"] == told.seconds["passes"] / 2
    assert faster.seconds["choosing"] == told.seconds["choosing"] == SMALL.block * 4 / model.HERE.choose
    assert told.written["result"] == SMALL.weights
    assert told.read["looks"] == 4 * SMALL.weights
    cut = model.estimate(SMALL, replace(WORK, method="minitron", mend=False), model.HERE)
    assert cut.written["result"] == 0.7 * SMALL.weights


def test_processes_share_what_they_can_and_pay_for_it() -> None:
    work = replace(WORK, method="sparsegpt", tokens=1 << 20)
    one, eight = (model.estimate(SMALL, work, replace(model.H100, processes=n), "memory") for n in (1, 8))
    assert one.network == 0 < eight.network
    assert eight.seconds["passes"] == one.seconds["passes"] / 8
    assert eight.seconds["looking at all weights"] == one.seconds["looking at all weights"]
    obs = replace(work, method="obs", mend=False)
    one, eight = (model.estimate(SMALL, obs, replace(model.H100, processes=n), "memory") for n in (1, 8))
    assert eight.seconds["orders"] == one.seconds["orders"] > 0  # orders are found by all alike


def test_stages_hold_a_share_of_the_weights() -> None:
    work = replace(WORK, method="minitron", mend=False, tokens=1 << 20)
    eight = replace(model.H100, processes=8)
    data, stages = (model.estimate(SMALL, work, eight, way) for way in ("memory", "stages"))
    assert stages.memory["weights"] == data.memory["weights"] / 8
    assert stages.seconds["passes"] > data.seconds["passes"]  # the pipeline fills first


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="no method gradnas"):
        model.estimate(SMALL, replace(WORK, method="gradnas"), model.HERE)
    with pytest.raises(ValueError, match="no way sideways"):
        model.estimate(SMALL, WORK, model.HERE, "sideways")


def test_predictions_are_near_what_was_measured() -> None:
    rows = model.check(json.loads(model.RESULTS.read_text()))
    assert len(rows) >= 10
    for row in rows:
        for name, factor in (("seconds", SECONDS), ("peak", PEAK), ("read", READ)):
            assert 1 / factor < row[name] < factor, f"{row['point']}: {name} x{row[name]:.2f}"


def test_the_page_has_the_table_that_is_computed() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert model.table(model.works()) in page
