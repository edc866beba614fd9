"""optimizers/gram.py: as exact as 12 quintic steps, whatever the spectrum, shape and scale."""

import pytest
import torch
from test_polar import make
from torch import Tensor

from optimizers.aurora import balanced_polar
from optimizers.gram import EXPRESS6, gram_polar
from optimizers.polar import polar

SHAPES = [(96, 24), (24, 96), (48, 32), (64, 64), (33, 32), (1, 16), (16, 1), (256, 64)]
SPECTRA = ["1/i", "100", "800", "flat"]


def matrix(m: int, n: int, spectrum: str) -> Tensor:
    r = min(m, n)
    if spectrum == "flat":
        return torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    if spectrum != "1/i":
        return make(m, n, float(spectrum))[0]
    U, _, Vh = torch.linalg.svd(matrix(m, n, "flat").double(), full_matrices=False)
    return U / torch.arange(1, r + 1) @ Vh


def rms(U: Tensor) -> float:
    return (torch.linalg.svdvals(U.double()) - 1).square().mean().sqrt().item()


def test_the_six_polynomials_end_within_two_thousandths_of_one() -> None:
    """On [1e-3, 1], each one's range being the next one's domain; and 1% beyond, for rounding."""
    s = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    for a, b, c in EXPRESS6:
        s = a * s + b * s**3 + c * s**5
        assert (s > 0).all()
    assert (s - 1).abs().max() < 0.0013
    beyond = torch.linspace(1, 1.01, 101, dtype=torch.float64)
    for a, b, c in EXPRESS6:
        beyond = a * beyond + b * beyond**3 + c * beyond**5
    assert (beyond - 1).abs().max() < 0.0013


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_singular_values_are_as_near_to_one_as_after_twelve_quintic_steps(
    shape: tuple[int, int], spectrum: str, dtype: torch.dtype
) -> None:
    """0.005 where the spectrum allows it; elsewhere no worse than 12 steps in bfloat16."""
    X = matrix(*shape, spectrum)
    found, reference = rms(polar(X, "gram6", dtype)), rms(polar(X, "quintic12"))
    assert found < max(0.005, reference)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_polar_factor_and_not_another_orthogonal_matrix(shape: tuple[int, int]) -> None:
    X, exact = make(*shape, 10)
    for dtype, allowed in ((torch.float64, 2e-3), (torch.float32, 2e-3), (torch.float16, 2e-2)):
        U = polar(X, "gram6", dtype)
        assert ((U.double() - exact).norm() / exact.norm()).item() < allowed
        assert U.dtype == dtype
        assert torch.equal(polar(X[None], "gram6", dtype)[0], U)


def test_bfloat16_is_not_used_where_it_is_too_coarse_or_slow() -> None:
    assert polar(torch.eye(4), "gram6", torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_a_gradient_of_any_scale_gives_the_same_factor(scale: float) -> None:
    X = matrix(96, 24, "flat")
    U, scaled = (polar(A, "gram6", torch.float16).float() for A in (X, X * scale))
    assert (U - scaled).norm() < 2e-3 * 24**0.5


def test_zero_matrices_and_zero_rows_stay_zero_beside_others() -> None:
    X = torch.stack([matrix(96, 24, "flat"), torch.zeros(96, 24)])
    X[0, 5] = 0
    U = polar(X, "gram6", torch.float16)
    assert U.isfinite().all() and not U[1].any() and not U[0, 5].any() and U[0].any()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_low_rank_matrix_stays_finite_and_below_one(rank: int) -> None:
    X = matrix(96, 24, "flat")[:, :rank] @ matrix(24, 24, "flat")[:rank]
    sigma = torch.linalg.svdvals(polar(X, "gram6", torch.float16).double())
    assert sigma.max() < 1.01 and sigma[rank - 1] > 0.9


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_aurora_is_as_even_as_with_twelve_quintic_steps(spectrum: str) -> None:
    rows = torch.randn(256, 1, generator=torch.Generator().manual_seed(0)).exp()
    X = (matrix(256, 64, spectrum) * rows)[None]

    def cv(U: Tensor) -> float:
        squares = U.double().square().sum(dim=-1)
        return (squares.std(correction=0) / squares.mean()).item()

    found = cv(balanced_polar(X, method="gram6", dtype=torch.float16))
    reference = cv(balanced_polar(X))
    assert found < 1.005 * reference


@pytest.mark.parametrize("seed", range(12))
def test_no_spectrum_makes_it_too_long(seed: int) -> None:
    """With R carried through three steps spectra like 1/i came out several times too long."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(256, 64, generator=generator) * torch.arange(1, 65) ** (-0.5 * (seed % 5))
    X = X * torch.randn(256, 1, generator=generator).mul(1 + seed % 3).exp()
    if seed % 2:
        X[::3] = X[:1]
    assert torch.linalg.svdvals(polar(X, "gram6", torch.float16).double()).max() < 1.01


def test_gathering_two_steps_changes_rounding_only() -> None:
    """Two columns of zeros make a square of a matrix, whose steps are taken one by one."""
    X = matrix(24, 48, "1/i")[None]
    square = torch.cat([X, torch.zeros(1, 24, 48)], dim=1)
    alone, beside = gram_polar(X, torch.float64), gram_polar(square, torch.float64)
    assert (alone - beside[:, :24]).norm() < 1e-9 and not beside[:, 24:].any()
