"""Each criterion on weights against a slow loop that knows the network by heart."""

from functools import cache
from typing import Any

import pytest
import torch
from small_nets import Mlp, Mobile, Residual, pictures, shaken
from tiny import tiny

from secateur.errors import SecateurError
from secateur.score.weights import batch_norm, fpgm, lamp, magnitude, random_scores
from secateur.space import Space, discover


@cache
def residual() -> tuple[Any, Space, str, str]:
    """The model, its Space, and the names of the stream's axis and the block's."""
    model = shaken(Residual())
    space = discover(model, pictures())
    stream, inside = sorted(space.axes, key=lambda a: -a.size)
    return model, space, stream.name, inside.name


def weights_of(net: Any, unit: int, *, stream: bool) -> list[torch.Tensor]:
    """All weights but biases that go with a unit."""
    if stream:
        first = [net.conv.weight[unit], net.bn.weight[unit], net.second.weight[unit], net.bn2.weight[unit]]
        return [*first, net.first.weight[:, unit], net.fc.weight[:, unit]]
    return [net.first.weight[unit], net.bn1.weight[unit], net.second.weight[:, unit]]


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_that_of_the_whole_group(p: int) -> None:
    net, space, stream, inside = residual()
    found = magnitude(net, space, p=p)
    for name, size in ((stream, 8), (inside, 6)):
        assert found[name].dtype == torch.float32
        assert found[name].shape == (size,)
        for unit in range(size):
            expected = sum(w.abs().pow(p).sum().item() for w in weights_of(net, unit, stream=name == stream))
            assert float(found[name][unit]) == pytest.approx(expected, rel=1e-5)


def test_magnitude_of_heads_counts_all_their_rows() -> None:
    model = tiny("llama", dtype=torch.float32)
    space = discover(model)
    axis = next(a for a in space.axes if a.kind == "heads")
    attention = model.model.layers[0].self_attn
    for head, score in enumerate(magnitude(model, space, [axis])[axis.name].tolist()):
        rows = slice(12 * head, 12 * head + 12)
        own = (attention.q_proj.weight[rows], attention.o_proj.weight[:, rows])
        assert score == pytest.approx(sum(w.square().sum().item() for w in own), rel=1e-5)


def test_magnitude_of_grouped_channels() -> None:
    """A unit of one of the groups: its filter, its scale, and four columns of what reads it after the flattening."""
    net = shaken(Mobile())
    space = discover(net, pictures())
    axis = next(a for a in space.axes if a.size == 16)
    assert axis.groups == 4
    found = magnitude(net, space, [axis], p=1)[axis.name]
    for unit in range(16):
        columns = slice(4 * unit, 4 * unit + 4)
        own = (net.grouped.weight[unit], net.norm.weight[unit], net.fc.weight[:, columns])
        assert float(found[unit]) == pytest.approx(sum(w.abs().sum().item() for w in own), rel=1e-5)


def test_lamp_divides_by_all_that_is_not_smaller() -> None:
    net, space, stream, _ = residual()
    squares = magnitude(net, space)[stream].double().tolist()
    expected = [m / sum(other for other in squares if other >= m) for m in squares]
    assert lamp(net, space)[stream].tolist() == pytest.approx(expected, rel=1e-5)
    assert float(lamp(net, space)[stream].max()) == 1


def test_lamp_counts_equals_in_each_other() -> None:
    net = Mlp()
    space = discover(net, torch.zeros(2, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        net.up.weight[0] = 0
        net.mid.weight[:, 0] = 0
    scores = lamp(net, space)[next(a.name for a in space.axes if a.size == 10)]
    assert scores.tolist() == pytest.approx([0.0] + [1 / 9] * 9)


def test_batch_norm_averages_the_norms_of_a_unit() -> None:
    net, space, stream, inside = residual()
    found = batch_norm(net, space)
    expected = (net.bn.weight.abs() + net.bn2.weight.abs()) / 2
    torch.testing.assert_close(found[stream], expected.detach())
    torch.testing.assert_close(found[inside], net.bn1.weight.abs().detach())


def test_batch_norm_names_the_axis_without_one() -> None:
    net = Mlp()
    with pytest.raises(SecateurError, match=r"batch_norm: no batch norm scales the units of \S*ffn.*magnitude_l2"):
        batch_norm(net, discover(net, torch.zeros(2, 4)))


def test_fpgm_is_the_distance_of_filters() -> None:
    net, space, stream, inside = residual()
    found = fpgm(net, space)
    filters = {
        stream: torch.cat([net.conv.weight.flatten(1), net.second.weight.flatten(1)], 1),
        inside: net.first.weight.flatten(1),
    }
    for name, rows in filters.items():
        expected = [sum(float((a - b).norm()) for b in rows.detach()) for a in rows.detach()]
        assert found[name].tolist() == pytest.approx(expected, rel=1e-5)


def test_random_is_seeded() -> None:
    _, space, stream, inside = residual()
    once, again, other = (random_scores(space, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once[stream], again[stream])
    assert not torch.equal(once[stream], other[stream])
    assert not torch.equal(once[stream][:6], once[inside])
    assert bool(((once[stream] >= 0) & (once[stream] < 1)).all())


def test_scores_leave_the_model_alone() -> None:
    net, space, _, _ = residual()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for scores in (magnitude(net, space), lamp(net, space), batch_norm(net, space), fpgm(net, space)):
        assert set(scores) == {axis.name for axis in space.axes}
        assert not any(values.requires_grad for values in scores.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
