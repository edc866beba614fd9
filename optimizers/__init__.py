"""Matrix optimizers by name; a new one is one file with one `update` and one line here."""

from .adamw import AdamW
from .aurora import Aurora
from .muon import Muon
from .normuon import NorMuon
from .riemannian import RiemannianAurora
from .unormuon import UNorMuon

OPTIMIZERS = {
    "adamw": AdamW,
    "muon": Muon,
    "normuon": NorMuon,
    "unormuon": UNorMuon,
    "aurora": Aurora,
    "riemannian": RiemannianAurora,
}
