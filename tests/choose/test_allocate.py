"""Who loses how much: OWL, shares by pattern, sensitivity tables."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from secateur.choose.allocate import from_table, owl, read_allocation, shares
from secateur.errors import SecateurError
from secateur.space.weights import Weight

WEIGHTS = [
    Weight(f"layers.{i}.{part}.weight", (n, 10), (0,), (1,)) for i in range(2) for part, n in (("up", 4), ("down", 6))
]
NAMES = [w.name for w in WEIGHTS]


def overall(found: dict[str, float]) -> float:
    return sum(w.size * found[w.name] for w in WEIGHTS) / sum(w.size for w in WEIGHTS)


def test_uniform() -> None:
    assert shares(WEIGHTS, 0.3, "uniform") == dict.fromkeys(NAMES, 0.3)


def test_owl_keeps_more_where_outliers_are() -> None:
    outliers = {name: 0.02 if ".0." in name else 0.06 for name in NAMES}
    found = owl(WEIGHTS, 0.7, outliers, 0.08)
    assert found == pytest.approx({name: 0.78 if ".0." in name else 0.62 for name in NAMES})
    assert owl(WEIGHTS, 0.7, dict.fromkeys(NAMES, 0.1), 0.08) == pytest.approx(dict.fromkeys(NAMES, 0.7))


def test_owl_is_the_formula_of_its_paper_and_exact_in_total() -> None:
    outliers = dict(zip(NAMES, [0.01, 0.05, 0.02, 0.03], strict=True))
    found = owl(WEIGHTS, 0.6, outliers, 0.08)
    scaled = {n: (x - 0.01) * (1 / 0.04) * 0.16 for n, x in outliers.items()}
    mean = overall(scaled)
    assert found == pytest.approx({n: 1 - (x - mean + 0.4) for n, x in scaled.items()})
    assert overall(found) == pytest.approx(0.6)
    with pytest.raises(SecateurError, match=r"choose a smaller owl_spread than 0\.3"):
        owl(WEIGHTS, 0.9, outliers, 0.3)


def test_patterns_say_and_the_others_make_up_for_it() -> None:
    found = shares(WEIGHTS, 0.5, {"layers.0": 0.4, "layers.1.up": 0.5})
    assert [found[n] for n in NAMES] == pytest.approx([0.4, 0.4, 0.5, (100 - 40 - 20) / 60])
    assert overall(found) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "sparsity", "message"),
    [
        ({"layers.0": 1.0}, 0.5, r"allocation layers.0: the share must be in \[0, 1\), not 1.0"),
        ({"layers.0": -0.1}, 0.5, "the share must be in"),
        ({"layers.0": "a"}, 0.5, "the share must be in"),
        ({"layer.0": 0.5}, 0.5, "matches no weight; did you mean 'layers.0'"),
        ({"layers.0": 0.5, "*.up.*": 0.4}, 0.5, "'layers.0' gives layers.0.up.weight 0.5 and .* gives it 0.4"),
        ({"layers": 0.5}, 0.6, "names every weight and comes to 50%, and the budget asks for 60%"),
        ({"layers.0": 0.9}, 0.1, "the other weights would have to lose -70% .* reachable are 45% to 95%"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], sparsity: float, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        shares(WEIGHTS, sparsity, given)


def test_a_table_gives_the_smallest_sum_of_losses() -> None:
    grid = {"0.2": 1.0, "0.4": 3.0, "0.6": 9.0}
    losses = {name: {s: loss * (i + 1) ** 2 for s, loss in grid.items()} for i, name in enumerate(NAMES)}
    found = from_table(WEIGHTS, 0.4, losses)
    assert overall(found) == pytest.approx(0.4)

    def loss(name: str, share: float) -> float:
        points = [(0.0, 0.0), *((float(s), x) for s, x in losses[name].items())]
        for (a, low), (b, high) in itertools.pairwise(points):
            if a <= share <= b + 1e-9:
                return low + (high - low) * (share - a) / (b - a)
        raise AssertionError(share)

    best = min(
        sum(loss(n, s) for n, s in zip(NAMES, chosen, strict=True))
        for chosen in itertools.product([i / 20 for i in range(13)], repeat=4)
        if overall(dict(zip(NAMES, chosen, strict=True))) >= 0.4 - 1e-9
    )
    assert sum(loss(n, s) for n, s in found.items()) <= best + 1e-6


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"layers.0": {"0.5": 1}}, "has no entries for layers.1.up.weight"),
        ({"layers": {"0.5": 1}, "layers.0": {"0.5": 1}}, "has 2 entries for layers.0.up.weight"),
        ({"layers": {"0.3": 1}}, "come to 30%, less than the budget's 40%"),
        ({"layers": {"1.3": 1}}, r"outside of \[0, 1\)"),
        ({"layers": {"0.5": float("nan")}}, "not finite"),
        ({"layers": 3}, "is not {share: loss}"),
    ],
)
def test_tables_that_say_too_little(losses: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        shares(WEIGHTS, 0.4, {"losses": losses})


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"layers.0": 0.2}))
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert read_allocation("owl") == "owl"
    assert read_allocation({"a": 0.1}) == {"a": 0.1}
    assert read_allocation('{"a": 0.1}') == {"a": 0.1}
    assert read_allocation(str(tmp_path / "a.json")) == {"layers.0": 0.2}
    for text, message in (
        ("unifrm", "there is no allocation 'unifrm'; did you mean 'uniform'"),
        (str(tmp_path / "none.json"), "cannot be read"),
        (str(tmp_path / "bad.json"), "is no JSON object"),
        ("{1", "is not JSON"),
        ('{"kind": "sensitivity", "format": 2, "losses": {}}', "'sensitivity' and format 2; this version reads"),
        ('{"kind": "bench", "format": 1, "losses": {}}', "a file of kind 'bench' and format 1"),
        ('{"kind": "sensitivity", "format": 1}', "losses must be"),
        (str(tmp_path / "binary.json"), "cannot be read .*invalid start byte"),
    ):
        with pytest.raises(SecateurError, match=message):
            read_allocation(text)
