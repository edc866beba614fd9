"""optimizers/polar.py against singular values in float64.

Unless said otherwise an error is relative, |U - exact| / |exact| in the Frobenius norm. What polar
has to do is of size 0.4 or more in these units: so far the input, at its best scale, is from exact.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizers.polar import POLAR, polar

SHAPES = [(8, 8), (32, 8), (8, 32), (1, 16), (16, 1), (1, 1), (9, 8), (8, 9), (48, 12), (64, 64)]


def make(m: int, n: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with singular values from 1 to 1/condition, and its exact polar factor."""
    generator, r = torch.Generator().manual_seed(seed), min(m, n)
    U, V = (
        torch.linalg.qr(torch.randn(k, r, dtype=torch.float64, generator=generator))[0]
        for k in (m, n)
    )
    sigma = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return U * sigma @ V.T, U @ V.T


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_the_reference_is_the_svd_and_far_from_the_input() -> None:
    X, exact = make(32, 8, 100)
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    assert error(U @ Vh, exact) < 1e-13 and abs(sigma[0] / sigma[-1] - 100) < 1e-9
    best = (X * exact).sum() / (X * X).sum()
    assert error(best * X, exact) > 0.4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [10, 100])
@pytest.mark.parametrize(
    "dtype, products, allowed",
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 3e-8),
        # The input is rounded to 8 bits and its smallest direction grows by up to the condition.
        (torch.float32, torch.bfloat16, 6e-4),
    ],
    ids=["float64", "float32", "bfloat16"],
)
def test_twelve_steps_give_the_polar_factor_to_the_precision_of_the_products(
    shape: tuple[int, int],
    condition: int,
    dtype: torch.dtype,
    products: torch.dtype,
    allowed: float,
) -> None:
    X, exact = make(*shape, condition)
    U = polar(X.to(dtype), "quintic12", products)
    assert U.dtype == products and U.shape == X.shape
    assert error(U, exact) < max(allowed * condition, 5 * torch.finfo(products).eps)


@pytest.mark.parametrize("method", ["jordan5", "express5"])
def test_too_few_steps_are_seen(method: str) -> None:
    X, exact = make(32, 8, 100)
    assert error(polar(X, method, torch.float64), exact) > 0.05


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (64, 64)], ids=str)
def test_singular_values_in_bfloat16_are_within_two_percent_of_one(shape: tuple[int, int]) -> None:
    for condition in (10, 100):
        X, _ = make(*shape, condition)
        sigma = torch.linalg.svdvals(polar(X.float()).double())
        assert 0.98 < sigma.min() and sigma.max() < 1.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_any_scale_gives_the_same_factor(dtype: torch.dtype) -> None:
    """The released code adds 1e-7 to the norm: at 1e-20 its update has shrunk to nothing."""
    X = make(24, 8, 10)[0].float()
    base = polar(X, "quintic12", dtype)
    for scale in (1e-30, 1e-20, 1e-7, 1e7, 1e20, 1e30):
        scaled = polar(X * scale, "quintic12", dtype)
        assert error(scaled, base.double()) < 4 * torch.finfo(dtype).eps, scale
    power = 2.0**-60  # exact in any binary format: not even a rounding differs
    assert torch.equal(polar(X * power, "quintic12", dtype), base)


def test_a_bfloat16_input_of_any_scale_stays_finite() -> None:
    X = make(24, 8, 10)[0]
    for scale in (1e-36, 1e-20, 1e20, 1e36):
        U = polar((X * scale).bfloat16())
        assert error(U, make(24, 8, 10)[1]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_matrix_stays_zero_beside_others(dtype: torch.dtype) -> None:
    X, exact = make(16, 8, 10)
    stack = torch.stack([torch.zeros(16, 8), X.float(), torch.zeros(16, 8)])
    U = polar(stack, "quintic12", dtype)
    assert torch.equal(U[0], torch.zeros(16, 8, dtype=dtype)) and torch.equal(U[2], U[0])
    assert error(U[1], exact) < 0.01


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 8)], ids=str)
def test_a_stack_equals_one_by_one(shape: tuple[int, int]) -> None:
    """To rounding: a batched product may sum in another order. Neighbours differ by about 1."""
    stack = torch.stack([make(*shape, 10, seed)[0] * 10.0**seed for seed in range(5)])
    together = polar(stack, "quintic12", torch.float64)
    for X, U in zip(stack, together, strict=True):
        assert error(polar(X, "quintic12", torch.float64), U) < 1e-13


@pytest.mark.parametrize("products", [torch.float64, torch.float32, torch.bfloat16])
def test_the_factor_of_the_transpose_is_the_transpose_bit_for_bit(products: torch.dtype) -> None:
    X = make(24, 8, 100)[0]
    assert torch.equal(polar(X.T, "quintic12", products), polar(X, "quintic12", products).T)


@pytest.mark.parametrize("method", POLAR)
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)], ids=str)
def test_zero_rows_and_columns_stay_exactly_zero(method: str, shape: tuple[int, int]) -> None:
    """The SVD left 1e-18 in them, which NorMuon divided by its own size: rows of noise."""
    X = make(*shape, 10)[0].float()
    X[[1, 5]] = 0
    X[:, 2] = 0
    U = polar(X, method, torch.float32)
    assert torch.equal(U == 0, X == 0) and U.any()


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'twelve'.*quintic12.*exact"):
        polar(torch.ones(4, 4), "twelve")


@pytest.mark.parametrize(
    "method, lowest, highest",
    [
        ("quintic12", 0.999, 1.001),
        ("jordan5", 0.68, 1.2),
        ("express5", 0.85, 1.15),
        ("express5+1", 0.99, 1.01),
        ("express8", 0.999, 1.001),
        ("exact", 1 - 1e-6, 1 + 1e-6),
    ],
)
def test_each_method_ends_where_its_source_says(method: str, lowest: float, highest: float) -> None:
    """Singular values after float32 products, for conditions of 10 to 100."""
    for condition in (10, 30, 100):
        for shape in ((48, 12), (12, 48), (32, 32)):
            X = make(*shape, condition)[0].float()
            sigma = torch.linalg.svdvals(polar(X, method, torch.float32).double())
            assert lowest < sigma.min() and sigma.max() < highest, (condition, shape)


def test_the_input_is_not_touched() -> None:
    X = make(24, 8, 10)[0].float()
    before = X.clone()
    polar(X)
    polar(X.T)
    assert torch.equal(X, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    k=st.integers(1, 3),
    seed=st.integers(0, 99),
    rank=st.integers(0, 24),
    exponent=st.integers(-25, 25),
)
def test_any_matrix_gives_a_finite_factor_with_norm_at_most_one(
    m: int, n: int, k: int, seed: int, rank: int, exponent: int
) -> None:
    """Of any rank and scale; bfloat16 rounding may exceed one by a percent."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(k, *shape, generator=generator) for shape in ((m, rank), (rank, n)))
    X = left @ right * 10.0**exponent
    U = polar(X).double()
    assert U.isfinite().all()
    assert torch.linalg.svdvals(U).max() <= 1.02
    assert ((U * X.double()).sum(dim=(-2, -1)) >= 0).all()
