"""Matrix optimizers by name; a new one is one file with one `update` and one line here."""

from .aurora import Aurora
from .muon import Muon

OPTIMIZERS = {"muon": Muon, "aurora": Aurora}
