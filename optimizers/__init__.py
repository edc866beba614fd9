"""Matrix optimizers by name; a new one is one file with one `update` and one line here."""

from .adamw import AdamW
from .aurora import Aurora
from .diagnostics import Diagnostics, activity
from .muon import Muon
from .normuon import NorMuon
from .riemannian import RiemannianAurora
from .slot import MatrixOptimizer
from .unormuon import UNorMuon

OPTIMIZERS = {
    "adamw": AdamW,
    "muon": Muon,
    "normuon": NorMuon,
    "unormuon": UNorMuon,
    "aurora": Aurora,
    "riemannian": RiemannianAurora,
}
__all__ = ["OPTIMIZERS", "Diagnostics", "MatrixOptimizer", "activity"]
__all__ += [kind.__name__ for kind in OPTIMIZERS.values()]
