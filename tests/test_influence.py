"""Influence functions of gradients against explicit inverses and loops over rows, in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from forvalue_callbacks import baselines
from helpers.models import build_model, build_rows

SHAPES = {"A": (3, 7), "B": (5, 3), "narrow": (2, 2)}


def random_gradients(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(n, *shape, generator=generator, dtype=torch.float64) for k, shape in SHAPES.items()}


@pytest.fixture
def sides():
    return random_gradients(9, 0), random_gradients(4, 1)


def explicit_influence(rows, validation, damping=0.1):
    """`G inv(mean g g^T + lam I) V^T`, layer by layer."""
    total = 0
    for name in rows:
        g, v = rows[name].flatten(1), validation[name].flatten(1)
        fisher = g.T @ g / len(g) + damping * g.square().mean() * torch.eye(g.shape[1], dtype=g.dtype)
        total = total + g @ torch.linalg.inv(fisher) @ v.T
    return total


def datainf_by_loops(rows, validation, damping=0.1):
    """DataInf, Eq. 5, as its published code runs: over validation rows, layers, and rows."""
    n, m = len(rows["A"]), len(validation["A"])
    out = torch.zeros(n, m, dtype=torch.float64)
    for j in range(m):
        for name in rows:
            g, v = rows[name], validation[name][j]
            lam = damping * torch.stack([(x**2).mean() for x in g]).mean()
            response = torch.zeros_like(v)
            for x in g:
                response += (v - (v * x).sum() / (lam + (x**2).sum()) * x) / (n * lam)
            for k in range(n):
                out[k, j] += (response * g[k]).sum()
    return out


def test_tracin_is_the_inner_product_of_whole_gradients(sides):
    g, v = (torch.cat([x.flatten(1) for x in side.values()], 1) for side in sides)
    torch.testing.assert_close(baselines.tracin(*sides), g @ v.T, rtol=1e-12, atol=1e-12)


def checkpoints(n):
    generator = torch.Generator().manual_seed(4)
    return [tuple(torch.randn(k, generator=generator, dtype=torch.float64) for k in (11, 6, 3)) for _ in range(n)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_z0_inf_is_the_inner_product_of_gradients_guessed_between_checkpoints(n):
    runs = checkpoints(n)

    def gradient(k, side, row):
        """Along each step to a neighbour, the slope of the row's log-likelihood."""
        near = [j for j in (k - 1, k + 1) if j in range(n)]
        total = torch.zeros(11, dtype=torch.float64)
        for j in near:
            step = runs[k][0] - runs[j][0]
            total += (runs[k][side][row] - runs[j][side][row]) * step / (step @ step) / len(near)
        return total

    want = [[sum(gradient(k, 1, i) @ gradient(k, 2, j) for k in range(n)) / n for j in range(3)] for i in range(6)]
    torch.testing.assert_close(baselines.z0_inf(runs), torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_z0_inf_of_linear_losses_is_that_of_gradients_along_the_run():
    """Two checkpoints, losses `<g, w>`: what is seen of both gradients is their part along the step."""
    g, v = torch.randn(6, 11, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    ends = torch.randn(2, 11, dtype=torch.float64)
    along = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
    got = baselines.z0_inf([(w, g @ w, v @ w) for w in ends])
    torch.testing.assert_close(got, torch.outer(g @ along, v @ along))


def test_z0_inf_says_nothing_of_a_run_that_stands_still_and_wants_two_checkpoints():
    (run,) = checkpoints(1)
    assert torch.equal(baselines.z0_inf([run, run]), torch.zeros(6, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 of at least 2"):
        baselines.z0_inf([run])


def test_tracin_over_checkpoints_weighs_them_by_their_learning_rates(sides):
    later = random_gradients(9, 2), random_gradients(4, 3)
    got = baselines.tracin_checkpoints(iter([(0.5, *sides), (0.1, *later)]))
    torch.testing.assert_close(got, 0.5 * baselines.tracin(*sides) + 0.1 * baselines.tracin(*later))
    with pytest.raises(ValueError, match="no checkpoint"):
        baselines.tracin_checkpoints([])


def test_datainf_in_closed_form_is_the_papers_loop_over_rows(sides):
    torch.testing.assert_close(baselines.datainf(*sides), datainf_by_loops(*sides), rtol=1e-11, atol=1e-11)


def test_datainf_is_exact_for_a_single_row(sides):
    one = {name: g[:1] for name, g in sides[0].items()}
    torch.testing.assert_close(baselines.datainf(one, sides[1]), explicit_influence(one, sides[1]))


@pytest.mark.parametrize("n", [2, 9, 40])
def test_exact_influence_is_the_explicit_inverse_with_few_rows_and_with_many(n):
    rows, validation = random_gradients(n, 0), random_gradients(4, 1)
    got, want = baselines.exact_influence(rows, validation), explicit_influence(rows, validation)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_lissa_converges_to_the_exact_influence(sides):
    exact = explicit_influence(*sides, damping=0.5)
    errors = [
        (baselines.lissa(*sides, damping=0.5, iterations=k) - exact).norm() / exact.norm() for k in (1, 30, 3000)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_lissa_has_one_limit_whatever_the_scale(sides):
    slow, fast = (baselines.lissa(*sides, damping=0.5, iterations=5000, scale=s) for s in (60.0, 30.0))
    torch.testing.assert_close(slow, fast, rtol=1e-10, atol=1e-10)


def test_hyperinf_is_the_explicit_inverse_of_the_generalised_fisher_matrix(sides):
    want = 0
    for name in SHAPES:
        g, v = sides[0][name], sides[1][name]
        fisher = sum(x.T @ x for x in g) / len(g)
        fisher += (0.1 * g.square().mean() + 1e-3) * torch.eye(g.shape[2], dtype=g.dtype)
        response = v @ torch.linalg.inv(fisher)
        want = want + torch.stack([torch.stack([(x * y).sum() for y in response]) for x in g])
    torch.testing.assert_close(baselines.hyperinf(*sides), want, rtol=1e-11, atol=1e-11)


def test_published_schulz_iteration_reaches_hyperinf_and_says_how_far_it_is(sides, caplog):
    residuals = {}
    torch.testing.assert_close(
        baselines.hyperinf(*sides, iterations=40, residuals=residuals), baselines.hyperinf(*sides)
    )
    assert set(residuals) == set(SHAPES)
    assert max(residuals.values()) < 1e-8
    assert not caplog.records
    early = baselines.hyperinf(*sides, iterations=2, residuals=residuals)
    assert min(residuals.values()) > 0.9
    assert "not converged" in caplog.text
    correlation = torch.corrcoef(torch.stack([early.flatten(), baselines.tracin(*sides).flatten()]))[0, 1]
    assert correlation > 0.999  # TracIn with another name


def test_hyperinf_refuses_flat_gradients(sides):
    with pytest.raises(ValueError, match=r"\(rows, r, d\)"):
        baselines.hyperinf(*({k: g.flatten(1) for k, g in side.items()} for side in sides))


INFLUENCES = ["tracin", "datainf", "exact_influence", "lissa", "hyperinf"]


@pytest.mark.parametrize("name", INFLUENCES)
def test_layers_without_gradients_add_nothing(sides, name):
    method = getattr(baselines, name)
    rows, validation = ({**side, "zero": torch.zeros_like(side["A"])} for side in sides)
    torch.testing.assert_close(method(rows, validation), method(*sides))


@pytest.mark.parametrize("name", INFLUENCES)
def test_every_influence_prefers_the_row_that_is_the_validation_row(sides, name):
    scores = getattr(baselines, name)(sides[0], {k: g[:4] for k, g in sides[0].items()})
    assert scores.argmax(0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", INFLUENCES)
def test_gradients_of_different_layers_are_refused(sides, name):
    with pytest.raises(ValueError, match="different layers"):
        getattr(baselines, name)(sides[0], {"A": sides[1]["A"]})


def test_outlier_gradients_finds_the_odd_row_out():
    rows = random_gradients(60, 0)
    rows["A"][17] += 8
    assert int(baselines.outlier_gradients(rows).argmin()) == 17


def test_gradients_are_zero_for_a_before_the_first_step_and_every_method_stands_that():
    model = get_peft_model(build_model(dtype=torch.float64), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rows, validation = (baselines.gradients(model, build_rows(n, seed=n)) for n in (6, 2))
    assert all(bool(g.any()) == ("lora_B" in name) for name, g in rows.items())
    for name in INFLUENCES:
        assert torch.isfinite(getattr(baselines, name)(rows, validation)).all()
