"""Techniques that set the size of an update by that of the weights, or the size of the weights.

Sources: modded-nanogpt's optimizer track, #9 (floor), #29 (brake and pin), #46 (rows, mask).
"""

import torch
from torch import Tensor

from .technique import Decay, Technique

TINY = 1e-30  # for 0 / 0, far below any norm


class Floor(Technique):
    """U max(1, tau |W| / |U|): an update has at least the share tau (`floor`) of the weights' norm.

    There is no upper bound. Source: track_3#9, the "u/w floor". FLOPs: 5 m n.
    """

    defaults = dict(floor=0.3825)
    dims: tuple[int, ...] = (-2, -1)  # of which norms are taken

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        size, least = (X.norm(dim=self.dims, keepdim=True) for X in (U, W))
        return U * (group["floor"] * least / size.clamp_min(TINY)).clamp_min(1.0)


class RowFloor(Floor):
    """Floor for each row: |u_i| >= tau |w_i|, without renormalising the whole. Source: #46."""

    dims = (-1,)


class RadialPin(Technique):
    """The norm of W follows the first-order radial part of the step, of which growth is braked.

        a = <U, W> / |W|^2;  U <- U - (1 - brake) a W  where a < 0, as that step would enlarge W
        after the step:  V <- V R / |V|,  R = |W| - lr <U, W> / |W|

    The growth of |W| by the tangential part of U is removed. A matrix that starts at zero has the
    norm 1e-8 after its first step, and grows from the second on, as in the entry.

    Source: track_3#29. FLOPs: 10 m n.
    """

    defaults = dict(brake=0.5)

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        square = W.square().sum(dim=(-2, -1), keepdim=True)
        a = (U * W).sum(dim=(-2, -1), keepdim=True) / square.clamp_min(TINY)
        return U - (1 - group["brake"]) * a.clamp_max(0) * W

    def after(self, V: Tensor, W: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        norm, size = (X.norm(dim=(-2, -1), keepdim=True) for X in (W, V))
        norm = norm.clamp_min(1e-8)
        radius = norm - group["lr"] * (U * W).sum(dim=(-2, -1), keepdim=True) / norm
        return V * (radius / size.clamp_min(TINY))


class MaskedDecay(Decay):
    """V (1 - lr wd M) after everything else, M = 1 where the step shrinks the weight: U W > 0.

    W are the weights before the step. Source: track_3#46.
    """

    defaults = dict(weight_decay=0.025)

    def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return V

    def after(self, V: Tensor, W: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return torch.where(U * W > 0, V * (1 - group["lr"] * group["weight_decay"]), V)
