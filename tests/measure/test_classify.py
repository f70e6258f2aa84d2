"""Accuracy, loss and agreement of classifiers, against sums by hand."""

from typing import Any

import pytest
import torch
from small_nets import Residual, pairs, shaken
from torch import nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.measure.classify import classify, compare_classes, labelled


def test_accuracy_and_loss_by_hand() -> None:
    net = shaken(Residual()).train()
    found = classify(net, pairs((3, 4)))
    assert net.training
    net.eval()
    x, y = (torch.cat(parts) for parts in zip(*pairs((3, 4)), strict=True))
    with torch.no_grad():
        logits = net(x)
    assert found.samples == 7
    assert found.accuracy == float((logits.argmax(1) == y).double().mean())
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, y)), rel=1e-5)
    assert found.choices.tolist() == logits.argmax(1).tolist()


class Pixels(nn.Module):
    """Logits [N, classes, H, W], or with the classes last."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), last

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(x).movedim(1, -1) if self.last else self.conv(x)


@pytest.mark.parametrize("last", [False, True])
def test_every_pixel_may_have_a_class(last: bool) -> None:
    torch.manual_seed(0)
    net, x = Pixels(last=last), torch.randn(2, 3, 5, 6)
    y = torch.randint(4, (2, 5, 6))
    y[0, 0] = -100
    found = classify(net, [(x, y)])
    with torch.no_grad():
        choices = net(x).argmax(-1 if last else 1)
    assert found.samples == 2 * 5 * 6 - 6
    assert found.accuracy == pytest.approx(float((choices == y)[y != -100].double().mean()))


def test_comparison_with_the_dense_model() -> None:
    dense, other = shaken(Residual()), shaken(Residual(), seed=9)
    found: Any = compare_classes(other, dense, pairs((6, 6)))
    before, after = classify(dense, pairs((6, 6))), classify(other, pairs((6, 6)))
    assert found["accuracy"] == {"dense": before.accuracy, "pruned": after.accuracy}
    assert found["loss"] == {"dense": before.loss, "pruned": after.loss}
    assert found["top1"] == pytest.approx(sum((before.choices == after.choices).tolist()) / 12)


def test_what_is_a_batch_for_a_classifier() -> None:
    x, y = pairs((2,))[0]
    assert labelled([(x, y), [x, y]])
    assert labelled([{"pixel_values": x, "labels": y}])
    assert not labelled([])
    assert not labelled([x])
    assert not labelled([{"input_ids": y[None], "labels": y[None]}])
    assert not labelled([(x, y), x])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "nothing to measure accuracy on"),
        ([(torch.zeros(2, 3, 5, 5), torch.zeros(2, 5))], r"targets are torch.float32 \[2, 5\] .*a class number"),
        ([(torch.full((1, 3, 5, 5), float("nan")), torch.zeros(1, dtype=torch.long))], "NaN or infinite .* batch 0"),
        ([(torch.zeros(1, 3, 5, 5), torch.full((1,), -100))], "nothing to measure accuracy on"),
    ],
)
def test_what_cannot_be_measured(batches: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        classify(shaken(Residual()), batches)
