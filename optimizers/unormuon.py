"""U-NorMuon: NorMuon whose tall updates stay as long as a matrix with orthonormal columns.

The direction is NorMuon's. Its rows have norms near sqrt(n/m), the only even value that m rows of
n orthonormal columns can have, and no aspect factor lifts them to 1:

    W <- (1 - lr wd) W - lr O^

Square and wide matrices get NorMuon's update, so the two differ in the step size of tall matrices
alone, by sqrt(m/n): compare them with that learning rate in mind.

Source: the Aurora blog, blog.tilderesearch.com/blog/aurora, as told in aurora.md 1.3.
Memory and FLOPs: NorMuon's.
"""

from torch import Tensor

from .normuon import NorMuon


class UNorMuon(NorMuon):
    """NorMuon at the norm of the polar factor. Hyperparameters: NorMuon's."""

    def scale(self, direction: Tensor, weight: Tensor, group: dict) -> float:
        return 1.0
