"""Polar factors of stacks of matrices: U = X (X^T X)^(-1/2), the nearest orthogonal matrix.

A tall matrix is orthogonal if its columns are orthonormal, a wide one if its rows are. Muon is
Nesterov momentum, then this. FLOPs of an m x n matrix, m >= 2 n: 9 m n^2 + 15 n^3 with gram6 and
24 n^3 for squares (gram.py); 4 m n^2 + 2 n^3 for each step of the other methods.
"""

from math import nan

import torch
from torch import Tensor

from .gram import EXPRESS6, gram_polar, length
from .symmetric import symmetric_obstacle
from .technique import Technique

# Odd polynomials a s + b s^3 + c s^5 that drive singular values in (0, 1] to 1, one (a, b, c) for
# each step. QUINTIC: p(1) = 1, p'(1) = 0, slope 2 at 0. CUBIC_END: p'(1) = p''(1) = 0 as well.
QUINTIC = (2.0, -1.5, 0.5)  # modded-nanogpt's track-3 entry #36
JORDAN = (3.4445, -4.775, 2.0315)  # kellerjordan.github.io/posts/muon; ends in 0.68 to 1.13
CUBIC_END = (1.875, -1.25, 0.375)
EXPRESS5 = (  # Polar Express, arXiv 2505.16932, for 5 steps, safety 1.02: ends in 0.86 to 1.14
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
EXPRESS8 = (  # the paper's list, before its safety factor of 1.01
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    CUBIC_END,
)


def with_safety(steps: tuple, factor: float) -> tuple:
    """Return steps that accept singular values up to `factor`: rounding may lift one beyond 1."""
    scaled = [(a / factor, b / factor**3, c / factor**5) for a, b, c in steps[:-1]]
    return (*scaled, steps[-1])


NORM = 8.0  # Frobenius norm of the scaled X: keeps entries above the denormals of float16
POLAR = {  # by name: largest singular value that may enter, steps; "exact" is the SVD
    "quintic12": (1.0, (QUINTIC,) * 12),
    "jordan5": (1.0, (JORDAN,) * 5),
    "express5": (1 / 1.02, EXPRESS5),
    "express5+1": (1 / 1.02, (*EXPRESS5, CUBIC_END)),
    "express8": (1 / 1.01, with_safety(EXPRESS8, 1.01)),
    "gram6": (1.0, EXPRESS6),  # through the Gram matrix, see gram.py
    "exact": (1.0, ()),
}


def entry_type(method: str, dtype: torch.dtype, X: Tensor) -> torch.dtype:
    """Return the type in which `factor` takes X.

    gram6 needs more than bfloat16 has: it computes in float16, on the CPU in float32, as CPUs are
    slow in half precision.
    """
    if method != "gram6":
        return torch.promote_types(X.dtype, torch.float32)
    if dtype == torch.bfloat16:
        return torch.float32 if X.device.type == "cpu" else torch.float16
    return dtype


def polar(X: Tensor, method: str = "quintic12", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the polar factor of every matrix of a stack, by one of POLAR's methods.

    X is (k, m, n) or (m, n), of any scale; the result has its shape, in `dtype` (gram6: in
    entry_type), in which the matmuls are computed. A zero matrix stays zero. 12 quintic steps lift
    singular values from 4.6e-4 of the Frobenius norm to within 1% of 1, express8 from 3.2e-4;
    docs/optimizers.md has a table.
    """
    if X.ndim == 2:
        return polar(X[None], method, dtype)[0]
    norm = length(X)
    X = X.to(norm.dtype) * (NORM / norm.clamp_min(NORM * torch.finfo(norm.dtype).tiny))
    return factor(X.to(entry_type(method, dtype, X)), NORM, method, dtype)


def factor(X: Tensor, norm: float | Tensor, method: str, dtype: torch.dtype) -> Tensor:
    """Return the polar factor of X (k, m, n), in its entry_type and of norm `norm` <= NORM."""
    if method not in POLAR:
        raise ValueError(f"unknown polar method {method!r}, choose one of {', '.join(POLAR)}")
    if method == "gram6":
        return gram_polar(X)
    if method == "exact":
        return exact_polar(X).to(dtype)
    tall, (largest, steps) = X.size(-2) > X.size(-1), POLAR[method]
    X = ((X.mT if tall else X) * (largest / norm)).to(dtype)
    for a, b, c in steps:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2, in the epilogue
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if tall else X


def exact_polar(X: Tensor) -> Tensor:
    """Return the polar factor by the SVD, in float64 except on MPS. Null directions stay zero."""
    broken = ~X.isfinite().all(dim=(-2, -1), keepdim=True)
    X = X.masked_fill(broken, 0)  # the SVD would fail; the result is nan
    U, sigma, Vh = torch.linalg.svd(X if X.is_mps else X.double(), full_matrices=False)
    floor = torch.finfo(X.dtype).eps * max(X.shape[-2:]) * sigma[..., :1]
    alive = X.any(dim=-1, keepdim=True) & X.any(dim=-2, keepdim=True)  # zero rows stay zero
    return ((U * (sigma > floor)[..., None, :] @ Vh).to(X.dtype) * alive).masked_fill(broken, nan)


class Polar(Technique):
    """U <- polar(U): orthogonalised momentum, if momentum came before.

    Hyperparameters: polar (a name in POLAR; track_3#36 has quintic12) and dtype, the type of the
    matmuls (gram6 takes float16 where this is bfloat16).
    """

    defaults = dict(polar="gram6", dtype=torch.bfloat16)
    choices = {"polar": POLAR}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        return polar(U, group["polar"], group["dtype"])

    def cost(self, shape: torch.Size, group: dict) -> float:
        return max(shape) * min(shape) ** 2

    def kernel(self, weight: Tensor, group: dict) -> str:
        if group["polar"] != "gram6":
            return ""
        entry = entry_type("gram6", group["dtype"], weight)
        obstacle = symmetric_obstacle(weight.device, entry, *weight.shape[-2:])
        return (
            f"symmetric matmuls in PyTorch: {obstacle}"
            if obstacle
            else "symmetric matmuls in Triton"
        )
