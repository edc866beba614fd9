"""optimizers/balance.py: the invariants of the balanced polar factor, and the optimizers' steps.

The float64 tests use exact polar factors; whole steps against a reference are in test_parity.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizers import Aurora, Muon
from optimizers.balance import balanced_polar
from optimizers.polar import polar

EXACT = dict(method="exact", dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows of log-normal size: what a momentum with starving neurons looks like."""
    return gaussian(m, n, seed=seed) * gaussian(m, 1, seed=seed + 100).exp()


def balance(X: Tensor, rounds: int = 2, exponent: float = 0.5) -> Tensor:
    return balanced_polar(X[None], rounds, exponent, **EXACT)[0]


def cv(U: Tensor) -> float:
    """Coefficient of variation of the row norms."""
    norms = U.double().norm(dim=-1)
    return (norms.std(correction=0) / norms.mean()).item()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- the balanced polar factor ---------------------------------------------------------------


def test_the_factor_is_orthogonal_and_more_even_than_the_polar_factor() -> None:
    X = uneven(48, 12)
    U, plain = balance(X), polar(X, **EXACT)
    assert (U.T @ U - torch.eye(12)).abs().max() < 1e-12
    assert cv(plain) > 0.5 and cv(U) < 0.1


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.7])
def test_only_the_directions_of_the_rows_matter(rounds: int, exponent: float) -> None:
    """A(diag(c) X) = A(X), c > 0; the plain polar factor moves by 1 under the same scaling."""
    X = uneven(48, 12)
    scaled = X * (3 * gaussian(48, 1, seed=7)).exp()
    assert error(polar(scaled, **EXACT), polar(X, **EXACT)) > 0.5
    assert error(balance(scaled, rounds, exponent), balance(X, rounds, exponent)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_any_scale_gives_the_same_factor(dtype: torch.dtype) -> None:
    """The released code clamps row norms at 1e-7: its rows are uneven by 0.34 at 1e-9."""
    X = uneven(64, 16).float()[None]
    base = balanced_polar(X, 2, 0.5, dtype=dtype)
    for scale in (1e-30, 1e-20, 1e-9, 1e9, 1e20, 1e30):
        found = balanced_polar(X * scale, 2, 0.5, dtype=dtype)
        assert error(found, base) < 30 * torch.finfo(dtype).eps, scale
    assert torch.equal(balanced_polar(X * 2.0**-60, 2, 0.5, dtype=dtype), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neuron_a_trillion_times_smaller_gets_the_same_update(dtype: torch.dtype) -> None:
    """A starved row beside healthy ones; an absolute floor of its norm would leave it starved."""
    X = gaussian(64, 16).float()
    small = X * torch.where(torch.arange(64) % 4 == 0, 2.0**-40, 1.0)[:, None]
    found, base = (balanced_polar(x[None], 2, 0.5, dtype=dtype) for x in (small, X))
    assert error(found, base) < 30 * torch.finfo(dtype).eps
    assert cv(polar(small, dtype=dtype)) > 0.3


def test_permuted_and_negated_rows_permute_and_negate_the_factor() -> None:
    X = uneven(48, 12)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    signs = gaussian(48, 1, seed=2).sign()
    assert error(balance(X[order]), balance(X)[order]) < 1e-10
    assert error(balance(signs * X), signs * balance(X)) < 1e-10


def test_rotated_columns_rotate_the_factor() -> None:
    X, Q = uneven(48, 12), torch.linalg.qr(gaussian(12, 12, seed=3))[0]
    assert error(balance(X @ Q), balance(X) @ Q) < 1e-10


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_row_norms_even_out_with_every_round(exponent: float) -> None:
    X = uneven(64, 16)
    spread = [cv(balance(X, rounds, exponent)) for rounds in range(1, 13)]
    assert all(later < earlier for earlier, later in zip(spread, spread[1:], strict=False))
    if exponent == 0.5:
        norms = balance(X, 40).norm(dim=-1)
        assert (norms - (16 / 64) ** 0.5).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_rounds_even_out_a_gaussian_to_half_a_percent(dtype: torch.dtype) -> None:
    """At 3072 x 768 it is 0.0028. The polar factor has 0.02 to 0.04."""
    for make in (gaussian, uneven)[dtype == torch.bfloat16 :]:  # which takes the CPU 5 s each
        X = make(1024, 256).float()
        assert cv(polar(X, dtype=dtype)) > 0.02
        assert cv(balanced_polar(X[None], 2, 0.5, dtype=dtype)[0]) < 0.005


@pytest.mark.parametrize("m, n", [(512, 128), (576, 192), (384, 256)])
def test_unevenness_shrinks_by_n_over_m_a_round(m: int, n: int) -> None:
    """The linear rate |1 - 2 beta (1 - n/m)| at beta = 1/2, for a Gaussian, within 15%."""
    spread = [cv(balanced_polar(gaussian(1, m, n), k, 0.5, **EXACT)[0]) for k in (2, 3, 4)]
    for earlier, later in zip(spread, spread[1:], strict=False):
        assert later / earlier == pytest.approx(n / m, rel=0.15)


def test_a_larger_exponent_is_faster_up_to_its_optimum() -> None:
    """beta = 1 / (2 (1 - n/m)) = 2/3 for four times as many rows as columns."""
    X = gaussian(512, 128)
    quarter, half, best = (cv(balance(X, 3, beta)) for beta in (0.25, 0.5, 2 / 3))
    assert best < half / 4 and half < quarter / 4


def test_the_second_round_is_one_step_of_tylers_fixed_point() -> None:
    """d_i^2 <- (n/m) / (x_i^T S^-1 x_i) with S the scatter of the rows scaled by d_i = 1/|x_i|."""
    X = uneven(48, 12)
    d = 1 / X.norm(dim=1, keepdim=True)
    scatter = (d * X).T @ (d * X)
    quadratic = ((X @ torch.linalg.inv(scatter)) * X).sum(dim=1, keepdim=True)
    tyler = ((12 / 48) / quadratic).sqrt()
    assert error(balance(X, 1), polar(tyler * X, **EXACT)) > 0.03
    assert error(balance(X, 2), polar(tyler * X, **EXACT)) < 1e-10


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-6), (torch.bfloat16, 0.1)])
def test_zero_rows_stay_zero_and_the_others_share_the_norm(
    dtype: torch.dtype, allowed: float
) -> None:
    """z dead neurons of m: the others get sqrt(n/(m - z)), 6.9% more than all would have got."""
    X = uneven(64, 16)
    dead = [0, 5, 6, 7, 30, 50, 62, 63]
    X[dead] = 0
    rounds, method = (30, "exact") if dtype == torch.float64 else (3, "quintic12")
    X = X.to(torch.promote_types(dtype, torch.float32))
    U = balanced_polar(X[None], rounds, 0.5, method=method, dtype=dtype)[0]
    alive = [i for i in range(64) if i not in dead]
    assert torch.equal(U[dead], torch.zeros(8, 16, dtype=dtype))
    assert (U[alive].double().norm(dim=1) / (16 / 56) ** 0.5 - 1).abs().max() < allowed


@pytest.mark.parametrize("m, n", [(32, 8), (3072, 8)])
def test_a_zero_matrix_stays_zero_beside_others(m: int, n: int) -> None:
    """mlp.proj starts at zero, so the first gradient of fc is exactly zero. With a thousand rows
    and more, 0 was once multiplied by a number beyond float32: the first run on a GPU was nan."""
    X = torch.stack([torch.zeros(m, n), uneven(m, n).float()])
    U = balanced_polar(X, 3, 0.5, dtype=torch.bfloat16)
    assert torch.equal(U[0], torch.zeros(m, n, dtype=torch.bfloat16))
    assert cv(U[1]) < 0.15 and abs(U[1].float().norm() / 8**0.5 - 1) < 0.01


HARD = {
    "rank 2": lambda: gaussian(64, 2) @ gaussian(2, 16, seed=1),
    "rank 1": lambda: gaussian(64, 1) @ gaussian(1, 16, seed=1),
    "all rows equal": lambda: gaussian(1, 16).expand(64, 16).clone(),
    "pairs of equal rows": lambda: gaussian(32, 16).repeat(2, 1),
    "half of the rows in 2 dimensions": lambda: torch.cat(
        [gaussian(32, 2) @ gaussian(2, 16, seed=1), gaussian(32, 16, seed=2)]
    ),
    "one row not zero": lambda: torch.eye(64, 16) * torch.eye(64)[:, :1],
    "fewer rows not zero than columns": lambda: gaussian(64, 16) * (torch.arange(64) < 5)[:, None],
    "tiny": lambda: 1e-20 * gaussian(64, 16),
    "rows of very different size": lambda: (
        gaussian(64, 16) * 10.0 ** torch.linspace(-15, 5, 64, dtype=torch.float64)[:, None]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HARD)
def test_degenerate_momentum_gives_a_bounded_descent_direction(
    kind: str, dtype: torch.dtype
) -> None:
    """sigma_max(U) <= 1.01 and 0 < <X, U> <= nuclear norm of X (to the 1%, whatever X is)."""
    X = HARD[kind]().float()[None]
    for rounds in (1, 2, 4):
        U = balanced_polar(X, rounds, 0.5, dtype=dtype)[0].double()
        assert U.isfinite().all()
        assert torch.linalg.svdvals(U).max() <= 1.01
        descent, nuclear = (X[0].double() * U).sum(), torch.linalg.svdvals(X[0].double()).sum()
        assert 0 < descent <= 1.01 * nuclear


def test_the_directions_of_a_low_rank_momentum_are_kept() -> None:
    """of a rank 4 matrix, four singular values are near one."""
    X = gaussian(256, 4) @ gaussian(4, 64, seed=1)
    U = balanced_polar(X.float()[None], 2, 0.5, dtype=torch.bfloat16)[0]
    assert torch.linalg.svdvals(U.double())[3] > 0.9


def test_an_infeasible_row_set_stays_finite_over_many_rounds() -> None:
    """More than their share of rows in a subspace: no even solution exists, weights drift."""
    X = torch.cat([gaussian(32, 2) @ gaussian(2, 16, seed=1), gaussian(32, 16, seed=2)])
    U = balance(X, 60)
    assert U.isfinite().all() and torch.linalg.svdvals(U).max() < 1.0001


def test_a_stack_equals_one_by_one() -> None:
    stack = torch.stack([uneven(24, 6, seed) * 10.0**seed for seed in range(4)])
    together = balanced_polar(stack, 3, 0.5, **EXACT)
    for X, U in zip(stack, together, strict=True):
        assert error(balance(X, 3), U) < 1e-12


def test_the_input_is_not_touched() -> None:
    X = uneven(24, 6)[None].float()
    before = X.clone()
    balanced_polar(X, 3, 0.5, dtype=torch.bfloat16)
    assert torch.equal(X, before)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 12),
    extra=st.integers(1, 30),
    rounds=st.integers(1, 5),
    exponent=st.floats(0.1, 0.8),
    rank=st.integers(0, 12),
    seed=st.integers(0, 99),
    scale=st.integers(-25, 25),
)
def test_any_tall_matrix_gives_a_finite_factor_with_norm_at_most_one(
    n: int, extra: int, rounds: int, exponent: float, rank: int, seed: int, scale: int
) -> None:
    m = n + extra
    X = (gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)) * 10.0**scale
    X = X.float()[None]
    U = balanced_polar(X, rounds, exponent, dtype=torch.bfloat16).double()
    assert U.isfinite().all() and torch.linalg.svdvals(U).max() <= 1.02
    assert (X.double() * U).sum() >= 0


# ---- which matrices are balanced -------------------------------------------------------------


def direction(optimizer: type, grad: Tensor, **group) -> Tensor:
    """The first update: with zero weights, no decay and lr 1, minus the new weights."""
    W = torch.nn.Parameter(torch.zeros_like(grad))
    how = dict(lr=1.0, weight_decay=0.0, dtype=torch.float64, polar="exact")
    opt = optimizer([dict(params=[W], **group)], **how)
    W.grad = grad
    opt.step()
    return -W.detach() / max(1, grad.size(0) / grad.size(1)) ** 0.5


TALL, WIDE, SQUARE = uneven(48, 12), uneven(48, 12).T.contiguous(), uneven(16, 16)


def test_a_square_matrix_gets_the_polar_factor_bit_for_bit() -> None:
    for axis in (None, 0, 1):
        for dtype in (torch.float64, torch.bfloat16):
            found, plain = (
                direction(kind, SQUARE, neuron_axis=axis, dtype=dtype) for kind in (Aurora, Muon)
            )
            assert torch.equal(found, plain)


def test_wide_with_neurons_as_columns_is_the_transpose_of_tall_with_neurons_as_rows() -> None:
    tall, wide = direction(Aurora, TALL, neuron_axis=0), direction(Aurora, WIDE, neuron_axis=1)
    assert cv(tall) < 0.15
    assert error(wide, tall.T) < 1e-13


@pytest.mark.parametrize("grad", [TALL, WIDE, SQUARE], ids=["tall", "wide", "square"])
def test_a_group_without_neurons_is_plain_muon_whatever_its_shape(grad: Tensor) -> None:
    """Fused QKV is 3:1 and no MLP matrix: the shape must not decide."""
    assert torch.equal(direction(Aurora, grad, neuron_axis=None), direction(Muon, grad))


def test_a_group_that_says_nothing_has_its_neurons_along_the_longer_side() -> None:
    assert torch.equal(direction(Aurora, TALL), direction(Aurora, TALL, neuron_axis=0))
    assert torch.equal(direction(Aurora, WIDE), direction(Aurora, WIDE, neuron_axis=1))
    assert torch.equal(direction(Aurora, SQUARE), direction(Muon, SQUARE))


@pytest.mark.parametrize(
    "which, tall_is_even, wide_is_even",
    [("fc", True, False), ("proj", False, True), ("both", True, True)],
)
def test_balance_chooses_by_the_axis_of_the_neurons(
    which: str, tall_is_even: bool, wide_is_even: bool
) -> None:
    plain = polar(TALL, **EXACT)
    for grad, axis, even in ((TALL, 0, tall_is_even), (WIDE, 1, wide_is_even)):
        U = direction(Aurora, grad, neuron_axis=axis, balance=which)
        U = U.T if axis else U
        assert error(U, balance(TALL) if even else plain) < 1e-10
    assert error(balance(TALL), plain) > 0.3


def test_neurons_along_the_shorter_side_need_no_balance() -> None:
    """There a polar factor has unit norms already; the released code would even out the others."""
    for grad, axis in ((WIDE, 0), (TALL, 1)):
        found = direction(Aurora, grad, neuron_axis=axis)
        assert torch.equal(found, direction(Muon, grad))
        assert cv(found if axis == 0 else found.T) < 1e-12


def test_rounds_exponent_and_polar_method_of_a_group_are_used() -> None:
    base = direction(Aurora, TALL, neuron_axis=0)
    for changed in (dict(rounds=3), dict(exponent=0.25), dict(polar="jordan5")):
        assert error(direction(Aurora, TALL, neuron_axis=0, **changed), base) > 1e-4
    assert error(direction(Aurora, TALL, neuron_axis=0, rounds=3), balance(TALL, 3)) < 1e-10


def test_a_tall_update_has_unit_rows_after_scaling() -> None:
    """sqrt(n/m) times sqrt(m/n): the step of every neuron is lr long, whatever its gradient."""
    W = torch.nn.Parameter(torch.zeros(256, 64))
    opt = Aurora([dict(params=[W], neuron_axis=0)], lr=0.1, weight_decay=0.0, rounds=4)
    W.grad = uneven(256, 64).float()
    opt.step()
    assert (W.detach().norm(dim=1) / 0.1 - 1).abs().max() < 0.02
