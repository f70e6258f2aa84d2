"""What patterns mean, and what is wrong with them."""

from functools import cache
from typing import Any

import pytest
from small_nets import Mobile, Residual, pictures
from tiny import tiny

from secateur.choose.select import check_divisors, choose_axes, divisor_of, least_units, matching
from secateur.errors import SecateurError
from secateur.space import Space, discover


@cache
def setting(name: str) -> tuple[Space, list[str]]:
    nets: dict[str, Any] = {"residual": Residual, "mobile": Mobile}
    model = nets[name]() if name in nets else tiny(name, device="meta")
    space = discover(model, pictures()) if name in nets else discover(model)
    return space, [path for path, _ in model.named_modules()]


def chosen(name: str, only: tuple[str, ...] = (), ignore: tuple[str, ...] = ()) -> list[int]:
    space, modules = setting(name)
    return sorted(axis.size for axis in choose_axes(space, modules, only, ignore))


def test_a_module_means_every_axis_that_runs_through_it() -> None:
    assert chosen("residual") == [6, 8]
    assert chosen("residual", ignore=("fc",)) == [6]  # it reads the stream
    assert chosen("residual", ignore=("bn1",)) == [8]
    assert chosen("residual", only=("bn[12]",)) == [6, 8]
    assert chosen("mobile", ignore=("grouped.weight",)) == [12]
    assert chosen("residual", only=("bn1.*",)) == [6]


def test_kinds_and_names_of_axes() -> None:
    space, modules = setting("llama")
    assert {a.kind for a in choose_axes(space, modules, ("ffn", "hidden"), ())} == {"ffn", "hidden"}
    names = [a.name for a in choose_axes(space, modules, ("model.layers.1.*",), ("heads",))]
    assert names
    assert all(".1." in name or name == "hidden" for name in names)
    assert matching(space, modules, "ffn", "only") == {a.name: True for a in space.of_kind("ffn")}
    through = matching(space, modules, "model.layers.0.ml?", "only")
    assert through["model.layers.0.mlp.ffn"] is False, "the module is named, not the axis"
    assert "hidden" in through


def test_head_dimensions_go_only_on_request() -> None:
    space, modules = setting("gpt2")
    assert space.of_kind("head_dim")
    kinds = {a.kind for a in choose_axes(space, modules, (), ())}
    assert kinds == {"hidden", "ffn", "heads"}
    assert {a.kind for a in choose_axes(space, modules, ("head_dim",), ())} == {"head_dim"}
    inside = choose_axes(space, modules, ("transformer.h.0.attn",), ())
    assert "head_dim" not in {a.kind for a in inside}
    by_name = space.of_kind("head_dim")[0].name
    assert [a.name for a in choose_axes(space, modules, (by_name,), ())] == [by_name]


@pytest.mark.parametrize(
    ("name", "only", "ignore", "message"),
    [
        ("residual", (), ("secnd",), "ignore: 'secnd' matches no kind, axis or module; did you mean 'second'"),
        ("residual", ("chanels",), (), "only: 'chanels' matches no kind, axis or module; did you mean 'channels'"),
        ("llama", ("model.layers.7.*",), (), "only: 'model.layers.7.*' matches no kind, axis or module"),
        ("residual", ("channels",), ("channels",), "'channels' is in both only and ignore"),
        ("residual", (), ("channels",), r"nothing can be cut: no axis is left of the model without \['channels'\]"),
        ("gpt2", (), ("hidden", "ffn", "heads"), "head_dim is cut only when named in only"),
    ],
)
def test_patterns_that_cannot_be(name: str, only: tuple[str, ...], ignore: tuple[str, ...], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        chosen(name, only, ignore)


def least(keep: float, limits: dict[str, float], ignore: tuple[str, ...] = ()) -> dict[int, int]:
    space, modules = setting("residual")
    axes = choose_axes(space, modules, (), ignore)
    return {space.axis(n).size: k for n, k in least_units(space, modules, axes, keep, limits).items()}


def test_the_least_that_stays() -> None:
    assert least(0.0, {}) == {8: 1, 6: 1}
    assert least(0.5, {}) == {8: 4, 6: 3}
    assert least(0.1, {"bn1": 0.5}) == {8: 1, 6: 3}
    assert least(0.1, {"channels": 0.75, "fc": 0.25}) == {8: 6, 6: 2}
    assert least(0.1, {"fc": 0.0}) == {8: 8, 6: 1}


@pytest.mark.parametrize(
    ("keep", "limits", "message"),
    [
        (1.0, {}, "keep_at_least must be at least 0 and below 1, not 1.0"),
        (-0.1, {}, "keep_at_least must be at least 0"),
        (0.1, {"fc": 1.5}, "limits: fc=1.5 must be a share from 0 to 1"),
        (0.1, {"fcc": 0.5}, "limits: 'fcc' matches no kind, axis or module; did you mean 'fc'"),
        (0.1, {"bn1": 0.5}, "limits: 'bn1' matches only what is not cut anyway"),
    ],
)
def test_limits_that_cannot_be(keep: float, limits: dict[str, float], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        least(keep, limits, ignore=("bn1",) if "bn1" in limits else ())


def test_divisors() -> None:
    space, _ = setting("residual")
    axis = space.axes[0]
    assert [divisor_of(axis, r) for r in (None, 4, {"channels": 2}, {"ffn": 2})] == [1, 4, 2, 1]
    check_divisors({"channels": 2}, ["channels"])
    with pytest.raises(SecateurError, match="round_to: no axis of kind 'chanels' is cut; did you mean 'channels'"):
        check_divisors({"chanels": 2}, ["channels"])
    with pytest.raises(SecateurError, match="round_to of ffn must be at least 1, not 0"):
        check_divisors({"ffn": 0}, ["ffn"])
    with pytest.raises(SecateurError, match="round_to must be at least 1, not -1"):
        check_divisors(-1, ["ffn"])


def test_as_many_experts_stay_as_a_router_picks() -> None:
    model = tiny("mixtral", device="meta", num_local_experts=4, num_experts_per_tok=2)
    space = discover(model)
    modules = [path for path, _ in model.named_modules()]
    experts = space.of_kind("experts")
    assert experts
    assert set(least_units(space, modules, experts, 0.0, {}).values()) == {2}
