"""SparseGPT and ALPS against slow versions of themselves, and against each other, in float64."""

import itertools

import numpy as np
import pytest
import torch
from test_example_model import MODEL as FOLDER

from secateur.choose.mask import Layout, largest
from secateur.errors import SecateurError
from secateur.load.model import load_model
from secateur.mend.alps import alps
from secateur.mend.damping import damped, damped_inverse
from secateur.mend.sparsegpt import sparsegpt
from secateur.score.grams import grams
from secateur.space.weights import maskable
from secateur.walk import walk


def problem(rows: int, columns: int, seed: int = 0, samples: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns], and X'X of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def loss(new: torch.Tensor, old: torch.Tensor, gram: torch.Tensor) -> float:
    return float(torch.trace((new - old) @ gram @ (new - old).T))


def exact_obs(row: torch.Tensor, H: torch.Tensor, gone: list[int]) -> torch.Tensor:
    """One weight after another is taken away; all to its right that may still change make up for it, exactly."""
    w, columns = row.clone(), len(row)
    for i in range(columns):
        rest = torch.arange(i, columns)
        inverse = torch.linalg.inv(H[rest][:, rest])
        if i in gone:
            w[rest] -= w[i] / inverse[0, 0] * inverse[:, 0]
            w[i] = 0
    return w


@pytest.mark.parametrize("at_once", [3, 4, 128])
def test_sparsegpt_is_the_exact_update_of_obs(at_once: int) -> None:
    W, gram = problem(5, 12)
    masks, weights, _, used = sparsegpt([W[:2], W[2:]], gram, [12, 18], Layout(), columns_at_once=at_once)
    assert used == 0.01
    mask, new = torch.cat(masks), torch.cat(weights)
    assert int((~masks[0]).sum()) == 12
    assert int((~masks[1]).sum()) == 18
    H, _ = damped(gram, 0.01)
    for row, kept, got in zip(W, mask, new, strict=True):
        want = exact_obs(row, H, [i for i in range(12) if not kept[i]])
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert bool((new[~mask] == 0).all())
    assert bool((new[mask] != 0).all())


def test_sparsegpt_takes_what_costs_least_by_its_own_measure() -> None:
    W, gram = problem(4, 10, seed=3)
    (mask,), _, (worth,), _ = sparsegpt([W], gram, [20], Layout())
    H, _ = damped(gram, 0.01)
    want = torch.empty_like(W)
    for i in range(10):
        rest = torch.arange(i, 10)
        want[:, i] = W[:, i].square() / torch.linalg.inv(H[rest][:, rest])[0, 0]
    torch.testing.assert_close(worth, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(mask, largest(want.reshape(1, -1), [20]).reshape(4, 10))


def test_sparsegpt_chooses_groups_of_n_m_by_the_weights_of_that_moment() -> None:
    W, gram = problem(3, 8, seed=2)
    (mask,), (new,), _, _ = sparsegpt([W], gram, [12], Layout(n_m=(2, 4)))
    H, _ = damped(gram, 0.01)
    for row, kept, got in zip(W, mask, new, strict=True):
        w, gone = row.clone(), []
        for i in range(8):
            rest = torch.arange(i, 8)
            if i % 4 == 0:
                worth = [float(w[j] ** 2 / torch.linalg.inv(H[j:, j:])[0, 0]) for j in range(i, i + 4)]
                gone += sorted(range(i, i + 4), key=lambda j: worth[j - i])[:2]
            if i in gone:
                inverse = torch.linalg.inv(H[rest][:, rest])
                w[rest] -= w[i] / inverse[0, 0] * inverse[:, 0]
                w[i] = 0
        assert sorted(gone) == [i for i in range(8) if not kept[i]]
        torch.testing.assert_close(got, w, rtol=1e-8, atol=1e-10)


def test_alps_has_the_least_squares_weights_on_its_support() -> None:
    W, gram = problem(6, 16)
    (mask,), (new,), _ = alps([W], gram, [60], Layout(), refine=40)
    assert int((~mask).sum()) == 60
    H, _ = damped(gram, 0.01)
    for row, kept, got in zip(W, mask, new, strict=True):
        want = torch.zeros(16, dtype=torch.float64)
        if bool(kept.any()):
            want[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ row)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_alps_is_the_iteration_of_its_paper() -> None:
    W, gram = problem(3, 8, seed=5)
    (mask,), (new,), _ = alps([W], gram, [12], Layout(), iterations=7, refine=0, rho=0.2)
    H, _ = damped(gram, 0.01)
    E = H.diagonal().sqrt()
    H = H / E / E[:, None]
    B = (W * E).T
    D = torch.where(largest(B.T.abs().reshape(1, -1), [12]).reshape(3, 8).T, B, 0)
    V, rho, before = torch.zeros_like(B), 0.2, D != 0
    for step in range(1, 8):
        now = torch.linalg.solve(H + rho * torch.eye(8, dtype=torch.float64), H @ B - V + rho * D)
        whole = now + V / rho
        keep = largest(whole.T.abs().reshape(1, -1), [12]).reshape(3, 8).T
        D = torch.where(keep, whole, 0)
        V = V + rho * (now - D)
        if step % 3 == 0:
            changed = int((keep != before).sum())
            if changed == 0:
                break
            rho *= 1.3 if changed >= 1.2 else 1.2 if changed >= 0.06 else 1.1
            before = keep
    assert torch.equal(mask, keep.T)
    torch.testing.assert_close(new, torch.where(keep, B, 0).T / E, rtol=1e-9, atol=1e-12)


def test_alps_finds_nearly_the_best_support_of_a_small_problem() -> None:
    found, best = [], []
    for seed in range(6):
        W, gram = problem(1, 9, seed=seed)
        H, _ = damped(gram, 0.01)
        (_,), (new,), _ = alps([W], gram, [5], Layout(), refine=30)
        found.append(loss(new, W, H))
        every = []
        for support in itertools.combinations(range(9), 4):
            kept = list(support)
            w = torch.zeros(1, 9, dtype=torch.float64)
            w[0, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[0])
            every.append(loss(w, W, H))
        best.append(min(every))
    assert sum(found) <= 1.15 * sum(best)
    assert min(f / b for f, b in zip(found, best, strict=True)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("layout", [Layout(), Layout(n_m=(2, 4)), Layout("row"), Layout(block=(1, 4))])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_alps_is_never_worse_than_sparsegpt(layout: Layout, sparsity: float) -> None:
    for seed in range(8):
        W, gram = problem(24, 32, seed=seed)
        tile = layout.block[0] * layout.block[1]
        zeros = [round(sparsity * W.numel() / tile)]
        H, _ = damped(gram, 0.01)
        (mine,), (ours,), _ = alps([W], gram, zeros, layout)
        (theirs,), (other,), _, _ = sparsegpt([W], gram, zeros, layout)
        assert int(mine.sum()) == int(theirs.sum())
        assert loss(ours, W, H) <= loss(other, W, H)
        # and its support by itself: with the least-squares weights on either
        assert _best_on(mine, W, H) <= _best_on(theirs, W, H)


def _best_on(mask: torch.Tensor, W: torch.Tensor, H: torch.Tensor) -> float:
    new = torch.zeros_like(W)
    for row, kept, out in zip(W, mask, new, strict=True):
        if bool(kept.any()):
            out[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ row)
    return loss(new, W, H)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_alps_is_never_worse_than_sparsegpt_on_layers_of_the_bundled_model(sparsity: float) -> None:
    model = load_model(FOLDER, dtype="float32")[0]
    calibration = torch.from_numpy(np.load(FOLDER / "calib_ids.npy")[:16].astype(np.int64))
    weights = [w for w in maskable(model) if ".layers.0." in w.name or ".layers.4." in w.name]
    parameters = dict(model.named_parameters())
    compared = 0
    for stage in walk(model, [calibration], weights):
        for group in grams(stage.run, stage.weights, parameters, full=True, last=stage.last):
            assert group[0].gram is not None
            gram = group[0].gram.full().double()
            H, _ = damped(gram, 0.01)
            matrices = [r.weight.matrix(parameters[r.weight.name].detach(), r.part).double() for r in group]
            zeros = [round(sparsity * m.numel()) for m in matrices]
            ours, others = alps(matrices, gram, zeros, Layout()), sparsegpt(matrices, gram, zeros, Layout())
            for old, new, other in zip(matrices, ours[1], others[1], strict=True):
                assert loss(new, old, H) <= loss(other, old, H)
                compared += 1
    assert compared == 14


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything(solver: str, share: float) -> None:
    W, gram = problem(3, 8)
    solve = sparsegpt if solver == "sparsegpt" else alps
    result = solve([W], gram, [round(share * W.numel())], Layout())
    torch.testing.assert_close(result[1][0], W * (1 - share), rtol=1e-6, atol=1e-8)
    assert bool((result[0][0] == (share == 0)).all())


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_dead_inputs_go_first_and_are_left_as_they_were_where_they_stay(solver: str) -> None:
    W, gram = problem(3, 8)
    gram[2], gram[:, 2] = 0, 0
    solve = sparsegpt if solver == "sparsegpt" else alps
    for zeros, stay in ((3, 0), (2, 1)):
        result = solve([W], gram, [zeros], Layout())
        mask, new = result[0][0], result[1][0]
        assert int(mask[:, 2].sum()) == stay
        assert torch.equal(new[:, 2], W[:, 2] * mask[:, 2])
        assert bool(torch.isfinite(new).all())


def test_no_inputs_at_all_and_constant_ones() -> None:
    W, _ = problem(3, 8)
    for gram in (torch.zeros(8, 8, dtype=torch.float64), torch.full((8, 8), 5.0, dtype=torch.float64)):
        for result in (sparsegpt([W], gram, [12], Layout()), alps([W], gram, [12], Layout())):
            assert int(result[0][0].sum()) == 12
            assert bool(torch.isfinite(result[1][0]).all())
    constant = torch.full((3, 8), 0.5, dtype=torch.float64)
    _, gram = problem(3, 8)
    for result in (sparsegpt([constant], gram, [10], Layout()), alps([constant], gram, [10], Layout())):
        assert int(result[0][0].sum()) == 14


def test_a_matrix_without_an_inverse_is_damped_more_and_that_is_told() -> None:
    gram = torch.ones(6, 6, dtype=torch.float32) * 1e8
    gram[0, 1] = gram[1, 0] = 1.2e8  # no longer positive, whatever a little damping adds
    factor, _, used = damped_inverse(gram, 0.01)
    assert used > 0.01
    assert bool(torch.isfinite(factor).all())
    gram[0, 1] = gram[1, 0] = 1e12
    with pytest.raises(SecateurError, match="has no inverse, however much it is damped"):
        damped_inverse(gram, 0.01)


def test_alps_stays_finite_on_few_samples_with_hardly_any_damping() -> None:
    W, gram = problem(8, 64, samples=8)
    W, gram = W.float(), gram.float()
    (_,), (new,), _ = alps([W], gram, [256], Layout(), damping=1e-9, refine=100)
    assert bool(torch.isfinite(new).all())
