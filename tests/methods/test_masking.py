"""One-shot masks by magnitude, Wanda, SparseGPT and ALPS: formulas, odd inputs, bad inputs."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional

from secateur.choose.packed import PackedMasks
from secateur.choose.rescore import MaskScores
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.batches import run
from secateur.load.model import fingerprint
from secateur.methods.verbs import Result, decide, plan, prune
from secateur.ship import save

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
CALIBRATED = METHODS[1:]


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8, bias=bias), nn.Linear(8, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x)))  # type: ignore[no-any-return]


def rows(count: int = 20, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def zeros_in(model: nn.Module, name: str) -> int:
    return int((model.get_parameter(name) == 0).sum())


def test_wanda_prunes_each_row_by_what_the_pruned_layer_before_gives() -> None:
    model, x = Two().double(), rows().double()
    result = prune(model, "sparsity=50%", method="wanda", data=[x[:7], x[7:]])
    first, second = (model.get_parameter(f"{n}.weight").detach() for n in ("first", "second"))
    pruned = torch.zeros_like(first)
    norms = [math.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j in range(6)]
    for i in range(8):
        kept = sorted(range(6), key=lambda j: -abs(float(first[i, j])) * norms[j])[:3]
        pruned[i, kept] = first[i, kept]
    assert torch.equal(result.model.get_parameter("first.weight"), pruned)
    inner = functional.relu(x @ pruned.T + model.first.bias.detach())
    norms = [math.sqrt(sum(float(v) ** 2 for v in inner[:, j])) for j in range(8)]
    for i in range(4):
        kept = sorted(range(8), key=lambda j: -abs(float(second[i, j])) * norms[j])[:4]
        assert result.plan.masks["second.weight"][i].nonzero().flatten().tolist() == sorted(kept)


def test_magnitude_local_global_and_normalized() -> None:
    model = Two()
    with torch.no_grad():
        model.second.weight.mul_(10)
    sizes = {n: model.get_parameter(f"{n}.weight").detach().abs() for n in ("first", "second")}
    found = {}
    runs: dict[str, dict[str, Any]] = {
        "local": {},
        "global": {"scope": "global"},
        "norm": {"scope": "global", "normalize": True},
    }
    for name, options in runs.items():
        found[name] = plan(model, "sparsity=25%", method="magnitude", **options).masks
    for n, size in sizes.items():
        assert torch.equal(found["local"][f"{n}.weight"], size > size.flatten().sort().values[size.numel() // 4 - 1])
    both = torch.cat([s.flatten() for s in sizes.values()]).sort().values[19]
    assert all(torch.equal(found["global"][f"{n}.weight"], s > both) for n, s in sizes.items())
    normal = {n: s / s.square().sum().sqrt() for n, s in sizes.items()}
    both = torch.cat([s.flatten() for s in normal.values()]).sort().values[19]
    assert all(torch.equal(found["norm"][f"{n}.weight"], s > both) for n, s in normal.items())
    gone = {name: int((~masks["second.weight"]).sum()) for name, masks in found.items()}
    assert gone["global"] < gone["norm"]


def test_owl_gives_blocks_shares_by_their_outliers() -> None:
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, :3] *= 30
    batches = [tokens(4, 10)]
    decision = decide(model, "sparsity=60%", method="wanda", data=batches, allocation="owl", owl_times=4.0)
    shares = decision.details["masking"]["shares"]
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=name: inputs.setdefault(n, []).append(args[0].flatten(0, -2)))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lm_head" not in name
    ]
    with torch.no_grad():
        run(model, batches[0])
    for handle in handles:
        handle.remove()
    share = []
    for layer in range(3):
        scores = []
        for name, x in inputs.items():
            if f"layers.{layer}." in name:
                norm = torch.cat(x).double().square().mean(0).sqrt()
                scores.append((model.get_parameter(f"{name}.weight").detach().double().abs() * norm).flatten())
        every = torch.cat(scores)
        share.append(float((every > 4 * every.mean()).double().mean()))
    low, high = min(share), max(share)
    keep = [(s - low) / (high - low) * 0.16 for s in share]
    want = [0.6 - (k - sum(keep) / 3) for k in keep]
    for layer in range(3):
        got = {v for n, v in shares.items() if f"layers.{layer}." in n}
        assert len(got) == 1
        assert got.pop() == pytest.approx(want[layer], abs=1e-6)
    masks = decision.plan.masks
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == math.ceil(0.6 * total)


def test_shares_of_global_magnitude_go_with_any_method() -> None:
    model = Two()
    with torch.no_grad():
        model.second.weight.fill_(1.0)
    alike = plan(model, "sparsity=50%", method="magnitude", scope="global", normalize=True).masks
    for method in METHODS:
        masks = plan(model, "sparsity=50%", method=method, data=[rows()], allocation="magnitude").masks
        assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in alike.items()}
    assert len({float(m.float().mean()) for m in alike.values()}) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["sparsity=0%", "sparsity=37%", "n:m=2:4", "n:m=1:8", "n:m=3:4"])
def test_counts_are_exact(method: str, budget: str) -> None:
    model = Two() if "8" not in budget else nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    options: dict[str, Any] = {"ignore": ["first"]} if ":4" in budget and isinstance(model, Two) else {}
    data = None if method == "magnitude" else [rows(30, 8 if not isinstance(model, Two) else 6)]
    result = prune(model, budget, method=method, data=data, **options)
    elements = sum(m.numel() for m in result.plan.masks.values())
    zeros = sum(zeros_in(result.model, n) for n in result.plan.masks)
    if budget.startswith("n:m"):
        n, m = (int(part) for part in budget[4:].split(":"))
        assert zeros == elements * (m - n) // m
        for mask in result.plan.masks.values():
            assert set(mask.reshape(-1, m).sum(1).tolist()) == {n}
    else:
        assert zeros == math.ceil(float(budget[9:-1]) / 100 * elements)
    assert set(result.plan.masks) == {n for n, p in model.named_parameters() if p.dim() == 2} - {
        f"{n}.weight" for n in options.get("ignore", ())
    }


KINDS: dict[str, tuple[Any, Any]] = {
    "gpt2": (lambda: tiny("gpt2", dtype=torch.float32), [tokens(4, 12)]),
    "mixtral": (lambda: mixture("mixtral", dtype=torch.float32), [tokens(8, 12)]),
    "bfloat16": (lambda: tiny("llama", dtype=torch.bfloat16), [tokens(4, 12)]),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ConvTranspose2d(8, 4, 2),
            nn.Flatten(),
            nn.Linear(100, 5),
        ),
        [(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64))],
    ),
    "conv1d and conv3d": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(6, 4, 2)),
        [torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(0))],
    ),
    "encoder of torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
        [torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))],
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_model(method: str, kind: str) -> None:
    torch.manual_seed(0)
    make, data = KINDS[kind]
    model = make()
    before = fingerprint(model)
    result = prune(model, "sparsity=50%", method=method, data=data)
    assert fingerprint(model) == before
    masks = result.plan.masks
    elements = sum(m.numel() for m in masks.values())
    assert sum(zeros_in(result.model, n) for n in masks) == math.ceil(elements / 2)
    assert "unreached" not in result.report
    assert all(p.dtype == q.dtype for p, q in zip(model.parameters(), result.model.parameters(), strict=True))
    assert type(result.model) is type(model)
    expected = {"gpt2": 8, "mixtral": 12, "cnn": 4, "encoder of torch": 8, "bfloat16": 14, "conv1d and conv3d": 2}
    assert len(masks) == expected[kind]
    if method in ("sparsegpt", "alps") and kind != "bfloat16":
        kept = torch.cat([(result.model.get_parameter(n) - model.get_parameter(n))[m] for n, m in masks.items()])
        assert float((kept != 0).float().mean()) > 0.8  # the survivors were repaired


class Moody(nn.Module):
    """Layers of both modes, frozen and trained weights, and a buffer that every pass moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.second, self.first = nn.Linear(8, 4), nn.Linear(6, 8)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("none", None)
        self.first.weight.requires_grad = False
        self.second.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        found: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return found


@pytest.mark.parametrize("method", CALIBRATED)
def test_what_was_worked_on_is_the_cut_model(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a third copy")

    model = Moody()
    model.calls.fill_(7)
    monkeypatch.setattr("secateur.methods.verbs.apply", never)
    decision = decide(model, "sparsity=50%", method=method, data=[rows()])
    assert decision.pruned is not None
    assert float(decision.pruned.get_buffer("calls")) == float(model.calls) >= 7
    found = prune(model, "sparsity=50%", method=method, data=[rows()]).model
    assert float(found.get_buffer("calls")) == float(model.calls)
    assert isinstance(decision.plan.masks, PackedMasks)
    assert list(decision.plan.masks) == ["second.weight", "first.weight"]  # as of the model, not as they are visited
    assert decision.weights == {}
    for cut in (decision.pruned, found):
        assert type(cut) is Moody
        assert [m.training for m in cut.modules()] == [m.training for m in model.modules()] == [True, False, True]
        assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in model.parameters()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in cut.modules())
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {p.data_ptr() for p in cut.parameters()}
        for name, mask in decision.plan.masks.items():
            assert torch.equal(cut.get_parameter(name) != 0, mask)
            if method == "wanda":
                assert torch.equal(cut.get_parameter(name), model.get_parameter(name).masked_fill(~mask, 0))


def loss_of(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


def test_repair_pays_on_the_data_that_it_saw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    x = rows(400, 16) @ torch.randn(16, 16)
    lost = {m: loss_of(prune(model, "sparsity=60%", method=m, data=[x]).model, model, x) for m in METHODS}
    assert lost["alps"] < lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]


@pytest.mark.parametrize("method", CALIBRATED)
def test_what_no_data_reaches_is_masked_by_magnitude_and_named(method: str) -> None:
    class Idle(Two):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(5, 4)

    model = Idle()
    result = prune(model, "sparsity=50%", method=method, data=[rows()])
    assert result.report["unreached"] == ["idle.weight"]
    local = plan(model, "sparsity=50%", method="magnitude", scope="row" if method == "wanda" else "tensor")
    assert torch.equal(result.plan.masks["idle.weight"], local.masks["idle.weight"])
    assert torch.equal(
        result.model.get_parameter("idle.weight"), model.idle.weight.detach() * result.plan.masks["idle.weight"]
    )


@pytest.mark.parametrize("method", CALIBRATED)
def test_an_expert_without_a_token_is_named(method: str) -> None:
    model = mixture("mixtral", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2:] = -100 * model.model.layers[0].mlp.gate.weight[:1].abs()
    result = prune(model, "sparsity=50%", method=method, data=[tokens(1, 4)])
    assert "model.layers.0.mlp.experts.down_proj" in result.report["unreached"]
    mask = result.plan.masks["model.layers.0.mlp.experts.down_proj"]
    assert int((~mask).sum()) == mask.numel() // 2


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_without_variance(method: str) -> None:
    x = rows()
    x[:, 0], x[:, 1] = 0, 2  # dead, and constant
    result = prune(Two(), "sparsity=50%", method=method, data=[x])
    mask = result.plan.masks["first.weight"]
    assert int(mask.sum()) == 24
    assert not bool(mask[:, 0].any())
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_constant_weights_and_ties(method: str) -> None:
    model = Two()
    with torch.no_grad():
        model.second.weight.fill_(0.5)
    result = prune(model, "sparsity=50%", method=method, data=[rows()])
    assert zeros_in(result.model, "second.weight") == 16
    if method == "magnitude":  # of equals the first stay
        assert result.plan.masks["second.weight"].flatten().tolist() == [True] * 16 + [False] * 16


def test_tiles() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for method in METHODS:
        result = prune(
            model, "sparsity=50%", method=method, data=[rows(40, 8)], block=(1 if method == "wanda" else 2, 4)
        )
        mask = result.plan.masks["0.weight"]
        whole = (
            mask.reshape(4, 2, 2, 4).float().mean((1, 3))
            if method != "wanda"
            else mask.reshape(8, 2, 4).float().mean(2)
        )
        assert set(whole.flatten().tolist()) == {0.0, 1.0}
        assert int(mask.sum()) == 32


@pytest.mark.parametrize("method", CALIBRATED)
def test_scores_that_were_kept_give_the_masks_again_and_others(method: str, tmp_path: Path) -> None:
    model, data = tiny("llama", dtype=torch.float32), [tokens(6, 12)]
    result = prune(model, "sparsity=80%", method=method, data=data, keep_scores=True, scope="row")
    assert result.scores is not None
    save(result.model, tmp_path / "out", plan=result.plan, scores=result.scores)
    loaded = MaskScores.load(tmp_path / "out")
    loose = loaded.plan(_budget("sparsity=50%")).masks
    total = sum(m.numel() for m in loose.values())
    assert sum(int((~m).sum()) for m in loose.values()) == math.ceil(total / 2)
    if method != "sparsegpt":  # it chooses anew within every block of columns
        again = loaded.plan(_budget("sparsity=80%")).masks
        assert all(torch.equal(again[n], m) for n, m in result.plan.masks.items())
        assert all(bool(loose[n][m].all()) for n, m in again.items())
    tight = loaded.plan(_budget("n:m=2:4"))
    assert all(set(m.reshape(-1, 4).sum(1).tolist()) == {2} for m in tight.masks.values())
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    moved = apply(trained, tight)
    assert all(torch.equal(moved.get_parameter(n), trained.get_parameter(n) * m) for n, m in tight.masks.items())


def _budget(text: str) -> Any:
    from secateur import Budget

    return Budget.parse(text)


def test_scores_of_allocated_and_of_global_masks() -> None:
    model = Two()
    ranked = prune(model, "sparsity=50%", method="magnitude", scope="global", keep_scores=True)
    assert ranked.scores is not None
    direct = plan(model, "sparsity=30%", method="magnitude", scope="global")
    assert all(torch.equal(ranked.scores.plan(_budget("sparsity=30%")).masks[n], m) for n, m in direct.masks.items())
    shared = prune(model, "sparsity=50%", method="magnitude", allocation={"first": 0.25}, keep_scores=True).scores
    assert shared is not None
    tighter = shared.plan(_budget("sparsity=75%")).masks
    assert {n: int(m.sum()) for n, m in tighter.items()} == {"first.weight": 18, "second.weight": 2}
    with pytest.raises(
        SecateurError, match=r"first.weight would keep more .* the smallest that these .* reach is 33.33%"
    ):
        shared.plan(_budget("sparsity=20%"))
    with pytest.raises(SecateurError, match="does not divide its 6 inputs"):
        shared.plan(_budget("n:m=2:4"))


def test_files_of_scores_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"no readable scores.safetensors in .*--keep-scores"):
        MaskScores.load(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"nothing")
    with pytest.raises(SecateurError, match=r"no readable scores.safetensors"):
        MaskScores.load(tmp_path)


def test_batches_may_say_use_cache_and_come_under_inference_mode() -> None:
    model = tiny("llama", dtype=torch.float32)
    ids = tokens(2, 9)
    plain = plan(model, "sparsity=50%", method="sparsegpt", data=[ids])
    with torch.inference_mode():
        other = plan(model, "sparsity=50%", method="sparsegpt", data=[{"input_ids": ids.clone(), "use_cache": False}])
    assert all(torch.equal(mask, other.masks[name]) for name, mask in plain.masks.items())


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_batches_with_and_without_padding_changes_nothing(order: int) -> None:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    batches = [{"input_ids": tokens(2, 9), "attention_mask": m} for m in (torch.ones_like(mask), mask)]
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=3)
    found = plan(model, "sparsity=50%", method="wanda", data=batches[::order])
    other = plan(model, "sparsity=50%", method="wanda", data=batches)
    assert all(torch.equal(m, other.masks[n]) for n, m in found.masks.items())


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("magnitude", "params=50%", {}, "a budget of params is not served by masks"),
    ("magnitude", "sparsity=50% , memory=50%", {}, "a budget of memory is not served by masks"),
    ("wanda", "sparsity=50%", {"data": None}, "wanda needs data: give batches"),
    ("sparsegpt", "sparsity=50%", {"data": None}, "sparsegpt needs data"),
    ("alps", "sparsity=50%", {"data": None}, "alps needs data"),
    ("magnitude", "sparsity=50%", {"allocation": "owl", "data": None}, "allocation owl needs data"),
    ("magnitude", "sparsity=50%", {"normalize": True}, "normalize makes weights .* scope tensor compares none"),
    ("magnitude", "sparsity=50%", {"scope": "globl"}, "there is no scope 'globl'; did you mean 'global'"),
    ("magnitude", "sparsity=50%", {"scope": "global", "allocation": {"first": 0.1}}, "scope global ranks all weights"),
    ("wanda", "sparsity=50%", {"scope": "global"}, "wanda goes block by block and cannot rank all weights together"),
    ("wanda", "n:m=2:4", {"allocation": "owl"}, "n:m fixes the share of every weight"),
    ("wanda", "n:m=2:4", {}, "n:m=2:4 does not fit first.weight: 4 does not divide its 6 inputs; ignore it"),
    ("wanda", "n:m=4:8", {"only": ["second"], "block": (1, 2)}, "n:m and block contradict each other"),
    ("wanda", "sparsity=50%", {"block": (2, 1)}, "scope row compares within a row"),
    ("magnitude", "sparsity=50%", {"block": (3, 1)}, "blocks of 3x1 do not fit first.weight, a matrix of 8x6"),
    ("wanda", "sparsity=50%", {"owl_times": 3.0}, "owl_times and owl_spread go with allocation owl"),
    ("sparsegpt", "sparsity=50%", {"damping": 0.0}, "damping 0.0 must be above 0"),
    ("alps", "sparsity=50%", {"rho": -1.0}, "rho -1.0 must be above 0"),
    ("magnitude", "sparsity=50%", {"ignore": ["third"]}, "the pattern 'third' matches no weight"),
    ("magnitude", "sparsity=50%", {"only": ["first"], "ignore": ["first"]}, "has no weight to mask"),
    ("wanda", "sparsity=50%", {"allocation": "owl", "owl_spread": -0.1}, "owl_spread -0.1 must be above 0"),
    ("magnitude", "n:m=2:4", {"scope": "global", "only": ["second"]}, "n:m lets the elements of a group compete"),
    ("magnitude", "sparsity=50%", {"allocation": '{"losses": 3}'}, "losses must be {pattern"),
    ("alps", "sparsity=50%", {"refine": -1}, "refine -1 at least 0"),
    ("alps", "sparsity=50%", {"rho": float("inf")}, "rho inf must be above 0 and finite"),
    ("wanda", "sparsity=50%", {"data": [torch.randn(3, 5)]}, "Two does not run on the inputs"),
    ("magnitude", "sparsity=50%", {"iterations": 3}, "magnitude has no option 'iterations'"),
]


@pytest.mark.parametrize(("method", "budget", "options", "message"), BAD)
def test_what_cannot_be(method: str, budget: str, options: dict[str, Any], message: str) -> None:
    given = {"data": [rows()], **options}
    with pytest.raises(SecateurError, match=message):
        plan(Two(), budget.replace(" , ", ","), method=method, **given)


@pytest.mark.parametrize(
    "text", ["sparsity=100%", "sparsity=1.0", "sparsity=-1%", "sparsity=120%", "n:m=4:4", "n:m=0:4"]
)
def test_sparsity_is_below_one(text: str) -> None:
    with pytest.raises(SecateurError, match="budget"):
        plan(Two(), text, method="magnitude")
    with pytest.raises(SecateurError, match="n:m=1:4 is a sparsity of 75%, and the budget asks for 50% too"):
        plan(Two(), "sparsity=50%,n:m=1:4", method="magnitude")


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_none(method: str) -> None:
    model = Two()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match=r"second.weight holds NaN or infinite values"):
        plan(model, "sparsity=50%", method=method, data=[rows()])
    if method != "magnitude":
        x = rows()
        x[0, 0] = float("inf")
        with pytest.raises(SecateurError, match=r"NaN or infinite activations at the input of first.weight"):
            plan(Two(), "sparsity=50%", method=method, data=[x])


def result_of(**options: Any) -> Result:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = 3 + 2 * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return prune(model.eval(), "sparsity=50%", method="magnitude", **{"data": [x], **options})


def test_batch_norm_may_be_adapted_in_the_same_call() -> None:
    plain, adapted = result_of(), result_of(adapt_batch_norm=True)
    assert torch.equal(plain.model.get_buffer("1.running_mean"), torch.zeros(8))
    assert not torch.equal(adapted.model.get_buffer("1.running_mean"), torch.zeros(8))
    assert adapted.report["batch_norms_adapted"] == 1
    with pytest.raises(SecateurError, match="adapt_batch_norm needs data"):
        result_of(adapt_batch_norm=True, data=None)
