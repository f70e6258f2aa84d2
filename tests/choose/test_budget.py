"""Budgets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.choose.budget import Budget, Limit, parse_limit
from secateur.errors import SecateurError

SPELLINGS = {
    "params=70%": ("params", 0.7, True),
    "params = 70 %": ("params", 0.7, True),
    "params=100%": ("params", 1.0, True),
    "params=6e9": ("params", 6e9, False),
    "params=6E+9": ("params", 6e9, False),
    "params=6000000000": ("params", 6e9, False),
    "params=6B": ("params", 6e9, False),
    "params=6b": ("params", 6e9, False),
    "params=1.5T": ("params", 1.5e12, False),
    "params=.5M": ("params", 5e5, False),
    "params=12k": ("params", 12e3, False),
    "active_params=3B": ("active_params", 3e9, False),
    "flops=2G": ("flops", 2e9, False),
    "macs=50%": ("macs", 0.5, True),
    "memory=8GiB": ("memory", 8 * 2**30, False),
    "memory=8 gib": ("memory", 8 * 2**30, False),
    "memory=8GB": ("memory", 8e9, False),
    "memory=100B": ("memory", 100, False),
    "memory=3MiB": ("memory", 3 * 2**20, False),
    "memory=2TiB": ("memory", 2 * 2**40, False),
    "memory=5kB": ("memory", 5e3, False),
    "latency=12ms": ("latency", 0.012, False),
    "latency=1.5s": ("latency", 1.5, False),
    "latency=80us": ("latency", 8e-5, False),
    "latency=90%": ("latency", 0.9, True),
    "sparsity=50%": ("sparsity", 0.5, True),
    "sparsity=0.5": ("sparsity", 0.5, True),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling(text: str) -> None:
    measure, value, share = SPELLINGS[text]
    budget = Budget.parse(text)
    assert set(budget.limits) == {measure}
    assert budget.limits[measure].value == pytest.approx(value, rel=1e-12)
    assert budget.limits[measure].share is share
    assert not budget.dims
    assert budget.n_m is None


def test_several_are_anded_however_they_are_parted() -> None:
    expected = Budget({"params": Limit(0.7, True), "memory": Limit(8 * 2**30)}, n_m=(2, 4))
    assert Budget.parse("params=70%, memory=8GiB, n:m=2:4") == expected
    assert Budget.parse(["params=70%", "memory=8GiB,n:m=2:4"]) == expected
    assert Budget.parse(("params=70%", "", "memory=8GiB", "n:m = 2:4")) == expected


def test_dims_as_json_and_as_mapping() -> None:
    sizes = {"hidden_size": 192, "num_hidden_layers": 3}
    assert Budget.parse(dims='{"hidden_size": 192, "num_hidden_layers": 3}').dims == sizes
    assert Budget.parse(dims=sizes).dims == sizes
    assert Budget.parse("params=70%", dims=sizes).limits


def test_nothing_is_no_limit() -> None:
    assert Budget.parse() == Budget.parse("") == Budget()
    assert str(Budget()) == "no limit"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70%", "not of the form MEASURE=LIMIT"),
        ("parms=70%", "'parms'; did you mean 'params'"),
        ("xyzzy=1", "known: .*memory.*n:m.*params"),
        ("params=70%, params=1B", "given twice"),
        ("n:m=2:4, n:m=1:4", "given twice"),
        ("params=", "not a positive number"),
        ("params=-3", "not a positive number"),
        ("params=many", "not a positive number"),
        ("params=nan", "not a positive number"),
        ("params=inf", "not a positive number"),
        ("params=1e999", "params=1e999"),
        ("params=0", "above 0"),
        ("params=0%", "above 0"),
        ("params=120%", "at most 100%"),
        ("sparsity=1.5", r"must be in \[0, 1\)"),
        ("params=8GiB", "unknown unit 'GiB'; known for params: .*no unit"),
        ("memory=8", "unknown unit ''; known for memory: %, b, .*gib"),
        ("latency=12", "unknown unit ''; known for latency: %, s, ms, us"),
        ("latency=12min", "unknown unit 'min'"),
        ("sparsity=1B", "unknown unit 'B'"),
        ("n:m=24", "N:M with 0 < N < M"),
        ("n:m=4:2", "N:M with 0 < N < M"),
        ("n:m=4:4", "N:M with 0 < N < M"),
        ("n:m=0:4", "N:M with 0 < N < M"),
    ],
)
def test_each_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    "dims", ["{", "{}", "[1]", "3", '{"a": 0}', '{"a": -1}', '{"a": 1.5}', '{"a": true}', '{"a": "x"}']
)
def test_dims_that_make_no_sense(dims: str) -> None:
    with pytest.raises(SecateurError, match="dims"):
        Budget.parse(dims=dims)


def test_share_is_of_the_dense_cost() -> None:
    assert parse_limit("params", "70%").absolute(200) == pytest.approx(140)
    assert parse_limit("params", 50).absolute(200) == 50


@given(st.sampled_from(["params", "flops", "macs", "active_params"]), st.integers(1, 10**15))
def test_numbers_and_their_texts_agree(measure: str, count: int) -> None:
    assert parse_limit(measure, count) == parse_limit(measure, str(count)) == Limit(float(count))
    assert parse_limit(measure, float(count)).value == float(count)


@pytest.mark.parametrize("text", sorted(SPELLINGS))
def test_written_budget_reads_back(text: str) -> None:
    """`str` gives what one would write: it can be read again, and means the same."""
    budget = Budget.parse(text)
    again = Budget.parse(str(budget))
    (measure,) = budget.limits
    assert again.limits[measure].value == pytest.approx(budget.limits[measure].value, rel=1e-5)
    assert again.limits[measure].share is budget.limits[measure].share
