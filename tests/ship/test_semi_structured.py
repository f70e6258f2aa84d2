"""2:4 for sparse tensor cores: which weights fit and why not, told without a GPU; and one line where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn

from secateur.choose.mask import n_of_m
from secateur.errors import SecateurError
from secateur.ship import semi_structured
from secateur.ship.semi_structured import plan_semi_structured, require_sparse_gpu, to_semi_structured


class Net(nn.Module):
    """One weight for every reason."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4)
        self.table, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.head.weight = self.table.weight
        self.good, self.narrow, self.short = nn.Linear(64, 32), nn.Linear(40, 32), nn.Linear(64, 24)
        self.almost, self.dense = nn.Linear(64, 32), nn.Linear(64, 32)
        with torch.no_grad():
            for part in (self.head, self.good, self.narrow, self.short, self.almost):
                part.weight.mul_(n_of_m(part.weight.abs(), (2, 4)))
            self.almost.weight[3, :4] = 1


def test_what_fits_and_why_not() -> None:
    torch.manual_seed(0)
    model = Net().half()
    plan = plan_semi_structured(model)
    assert plan.converted == ["good.weight"]
    assert plan.left == {
        "conv.weight": "weight of a Conv2d: torch has 2:4 kernels for nn.Linear alone",
        "table.weight": "weight of a Embedding: torch has 2:4 kernels for nn.Linear alone",
        "narrow.weight": "40 inputs are no multiple of 16",
        "short.weight": "24 outputs are no multiple of 16",
        "almost.weight": "not 2:4: 0.195% of the groups of 4 hold more than 2 numbers",
        "dense.weight": "not 2:4: 100% of the groups of 4 hold more than 2 numbers",
    }
    assert (plan.bytes_before, plan.bytes_after) == (64 * 32 * 2, 64 * 32 * 2 // 2 + 64 * 32 // 8)
    cutlass = plan_semi_structured(model, backend="cutlass")
    assert cutlass.converted == ["good.weight"]
    assert cutlass.left["narrow.weight"] == "40 inputs are no multiple of 64"
    assert cutlass.left["short.weight"] == "24 outputs are no multiple of 32"


def test_a_tied_projection_stays() -> None:
    model = tiny("llama", dtype=torch.float16, tie_word_embeddings=True, hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(n_of_m(weight.abs(), (2, 4)))
    plan = plan_semi_structured(model)
    assert list(plan.left) == ["model.embed_tokens.weight"]
    assert len(plan.converted) == 14
    backwards = nn.ModuleDict({"head": nn.Linear(64, 32), "table": nn.Embedding(32, 64)}).half()
    backwards["head"].weight = backwards["table"].weight
    assert plan_semi_structured(backwards).left == {"head.weight": "is table.weight too, which reads it otherwise"}


def test_types_of_numbers() -> None:
    model = nn.Linear(64, 32)
    assert plan_semi_structured(model).left == {"weight": "float32: cusparselt takes float16, bfloat16"}
    assert plan_semi_structured(model.double(), backend="cutlass").left["weight"].startswith("float64: cutlass takes")
    with torch.no_grad():
        model.weight[:, ::2] = 0
    assert plan_semi_structured(model.float(), backend="cutlass").converted == ["weight"], "float32 goes by 1:2"
    with torch.no_grad():
        model.weight.copy_(n_of_m(torch.rand(32, 64), (2, 4)))
    assert plan_semi_structured(model, backend="cutlass").left["weight"].startswith("not 1:2:")
    assert plan_semi_structured(model.bfloat16()).converted == ["weight"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line() -> None:
    model = Net().half()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(SecateurError, match=r"^2:4 kernels need an NVIDIA GPU of Ampere or newer; torch says: "):
        to_semi_structured(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(SecateurError, match=r"there is no backend 'cutlas' for 2:4; did you mean 'cutlass'"):
        plan_semi_structured(model, backend="cutlas")


@pytest.mark.parametrize(
    ("device", "backend", "capability", "library", "message"),
    [
        ("cpu", "cusparselt", (8, 0), True, r"and the model is on cpu: move it there \(--device cuda\)"),
        ("cuda", "cusparselt", (7, 5), True, r"\(compute capability 8.0\); torch says: Card has 7.5"),
        ("cuda", "cutlass", (9, 0), True, r"CUTLASS kernels for compute capability 8.x alone, and Card has 9.0"),
        ("cuda", "cusparselt", (9, 0), False, "this torch is built without cuSPARSELt: take the backend cutlass"),
        ("cuda", "cusparselt", (9, 0), True, None),
        ("cuda", "cutlass", (8, 6), False, None),
    ],
)
def test_which_gpus(
    device: str,
    backend: str,
    capability: tuple[int, int],
    library: bool,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    if message is None:
        assert require_sparse_gpu(device, backend) == "Card"
    else:
        with pytest.raises(SecateurError, match=message):
            require_sparse_gpu(device, backend)


def test_the_planned_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion with a stand-in for torch's packing, which runs on GPUs alone."""
    seen: list[torch.Tensor] = []

    def from_dense(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return weight + 1

    constraints = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    kind = SimpleNamespace(from_dense=from_dense, _DTYPE_SHAPE_CONSTRAINTS=constraints)
    monkeypatch.setattr(semi_structured, "require_sparse_gpu", lambda *_: "Card")
    monkeypatch.setattr(semi_structured, "_tensor_class", lambda _: kind)
    model: Any = Net().half()
    dense = model.good.weight
    told = to_semi_structured(model)
    assert told.converted == ["good.weight"]
    assert torch.equal(seen[0], dense)
    assert len(seen) == 1
    assert torch.equal(model.good.weight, dense + 1)
    assert not model.good.weight.requires_grad
    with pytest.raises(SecateurError, match=r"Linear has no weight that 2:4 kernels could take \(weight: not 2:4"):
        to_semi_structured(nn.Linear(64, 32).half())
