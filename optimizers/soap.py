"""SOAP before a polar factor: the momentum, scaled elementwise in the eigenbases of two averages.

    A <- 0.9 A + 0.1 G G^T,  B <- 0.9 B + 0.1 G^T G,  with bases Q_A and Q_B
    P = Q_A^T U Q_B;  V <- 0.9 V + 0.1 P^2;  S = Q_A (P / sqrt(V)) Q_B^T at the Schatten-4 norm of U

Bases are used first and refreshed with this step's G then: in the first step by an eigen-
decomposition, later by one QR of A Q with its columns sorted by diag(Q^T A Q), V alike. The first
step has no bases and leaves U as it is.

Source: arXiv 2409.11321, as in modded-nanogpt's optimizer track, entries #30 and #44.
"""

import torch
from torch import Tensor

from .contra import schatten4
from .size import TINY
from .technique import Technique

SHARE = 0.1  # of this step in all averages


class Soap(Technique):
    """The momentum of `inner` in SOAP's bases; see above.

    Hyperparameters: those of `inner`; soap: "full", "floored" (V at least 0.55 of its root mean
    square, and 0.05 of the unscaled U mixed in, as attention has up to #43), "gated" (see `gate`)
    or "off"; soap_every: steps between two refreshes; soap_age: the step, from 0, which the
    schedule `age` sets; gate_floor, gate_cap. Memory: 4 (2 m^2 + 2 n^2 + m n) bytes. FLOPs: about
    8 (m + n) m n + 7 (m^3 + n^3) with a refresh in each step.
    """

    worth_compiling = False
    choices = dict(soap=("full", "floored", "gated", "off"))

    def __init__(self, inner: Technique) -> None:
        self.inner = inner
        self.defaults = inner.defaults | dict(soap="full", soap_every=1, soap_age=1.0)
        self.defaults |= dict(gate_floor=0.45, gate_cap=1.0)

    def init(self, grad: Tensor) -> dict[str, Tensor]:
        k, m, n = grad.shape
        sides = dict(left=m, left_basis=m, right=n, right_basis=n)
        state = {name: grad.new_zeros(k, side, side) for name, side in sides.items()}
        return self.inner.init(grad) | state | dict(soap_square=torch.zeros_like(grad))

    def before(self, G: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        U = self.inner.before(G, W, state, group)
        if group["soap"] == "off":
            return U
        S = U
        if (step := round(group["soap_age"])) > 0:
            S = self.scaled(U, state, group)
            if group["soap"] == "gated":
                S = gate(S, U, G, group["gate_floor"], group["gate_cap"])
        state["left"].lerp_(G @ G.mT, SHARE)
        state["right"].lerp_(G.mT @ G, SHARE)
        if step % group["soap_every"] == 0:
            for side, axis in (("left", -2), ("right", -1)):
                refresh(state[side], state[f"{side}_basis"], state["soap_square"], axis, step == 0)
        return S

    def scaled(self, U: Tensor, state: dict, group: dict) -> Tensor:
        """Return S, and update V."""
        left, right = state["left_basis"], state["right_basis"]
        P = left.mT @ U @ right
        V = state["soap_square"].lerp_(P.square(), SHARE)
        root = V.clamp_min(1e-16).sqrt()
        if group["soap"] == "floored":
            mean = V.mean(dim=(-2, -1), keepdim=True).sqrt()
            root = root.maximum(0.55 * mean)
        S = left @ (P / root) @ right.mT
        if group["soap"] == "floored":
            S = 0.95 * S + 0.05 * U
        return S * (schatten4(U) / schatten4(S).clamp_min(TINY))

    def cost(self, shape: torch.Size, group: dict) -> float:
        if group["soap"] == "off":
            return 0.0
        (m, n), every = shape[-2:], group["soap_every"]
        return 2 * m * n * (m + n) + 4 * (m**3 + n**3) / every


def refresh(A: Tensor, Q: Tensor, V: Tensor, axis: int, first: bool) -> None:
    """Bring the basis Q (k, m, m) nearer to the eigenvectors of A, largest first, in place."""
    if first:
        Q.copy_(torch.linalg.eigh(A)[1].flip(-1))
        return
    AQ = A @ Q
    order = (Q * AQ).sum(dim=-2).argsort(dim=-1, descending=True)  # of diag(Q^T A Q)
    columns = order[:, None, :].expand_as(Q)
    Q.copy_(torch.linalg.qr(AQ.gather(-1, columns))[0])
    places = order[:, :, None] if axis == -2 else order[:, None, :]
    V.copy_(V.gather(axis, places.expand_as(V)))


def cosine(X: Tensor, Y: Tensor) -> Tensor:
    """Return the cosine (k, 1, 1) between matrices as vectors."""
    inner = (X * Y).sum(dim=(-2, -1), keepdim=True)
    norms = [Z.norm(dim=(-2, -1), keepdim=True) for Z in (X, Y)]
    return inner / (norms[0] * norms[1]).clamp_min(TINY)


def gate(S: Tensor, U: Tensor, G: Tensor, floor: float, cap: float) -> Tensor:
    """Return U + g (S - U) at U's Schatten-4 norm: S where it agrees with momentum and gradient.

        a = clip((cos(S, U) - 0.2) / 0.8);  b = clip(cos(S, G) / cos(U, G));  g = clip(a b)

    a and b are clipped to 0 and 1, g to floor and cap; cos(U, G) is at least 1e-8.

    Source: track_3#44, for attention's output.
    """
    a = ((cosine(S, U) - 0.2) / 0.8).clamp(0, 1)
    b = (cosine(S, G) / cosine(U, G).clamp_min(1e-8)).clamp(0, 1)
    mixed = U + (a * b).clamp(floor, cap) * (S - U)
    return mixed * (schatten4(U) / schatten4(mixed).clamp_min(TINY))


def age(step: int, steps: int) -> float:
    """Return the step: a schedule for soap_age."""
    return float(step)
