"""Matrix optimizers by name, each a list of techniques.

A new optimizer is a class here; a new technique is a class of its own (technique.py says what it
sees). Settings are those of modded-nanogpt's track_3#36, with a cheaper polar factor.
"""

from .averages import Around, WeightAverage
from .balance import Balance, direction
from .diagnostics import Diagnostics, activity
from .polar import Polar
from .recipes import RECIPES, cooked, recipe_settings
from .riemannian import Climb
from .schedules import planned, ramp, trapezoid
from .slot import MatrixOptimizer
from .split import Split, split_parameters
from .technique import Adam, Aspect, CautiousDecay, Decay, EvenRows, Nesterov, Technique
from .whole import ModelOptimizer

__version__ = "0.2.0.dev0"


class AdamW(MatrixOptimizer):
    """The elementwise baseline: arXiv 1711.05101."""

    techniques, defaults = (Adam(), Decay()), dict(lr=0.002, weight_decay=0.1)


class Muon(MatrixOptimizer):
    """Orthogonalised momentum: kellerjordan.github.io/posts/muon."""

    techniques, defaults = (Nesterov(), Polar(), Aspect(), Decay()), dict(lr=0.025)


class NorMuon(MatrixOptimizer):
    """Muon with evened-out output neurons: arXiv 2510.05491."""

    techniques, defaults = (Nesterov(), Polar(), EvenRows(), Aspect(), Decay()), dict(lr=0.025)


class UNorMuon(MatrixOptimizer):
    """NorMuon without the aspect factor: tall updates stay shorter, blog.tilderesearch.com."""

    techniques, defaults = (Nesterov(), Polar(), EvenRows(), Decay()), dict(lr=0.025)


class Aurora(MatrixOptimizer):
    """Muon with evened-out hidden neurons: arXiv 2606.27715."""

    techniques, defaults = (Nesterov(), Balance(), Aspect(), Decay()), dict(lr=0.025)


class RiemannianAurora(MatrixOptimizer):
    """The even and orthogonal update furthest along the momentum: arXiv 2606.27715."""

    techniques, defaults = (Nesterov(), Climb(), Aspect(), Decay()), dict(lr=0.025)


OPTIMIZERS = {
    "adamw": AdamW,
    "muon": Muon,
    "normuon": NorMuon,
    "unormuon": UNorMuon,
    "aurora": Aurora,
    "riemannian": RiemannianAurora,
}
__all__ = ["OPTIMIZERS", "Adam", "Around", "Aspect", "Balance", "CautiousDecay", "Climb", "Decay"]
__all__ += ["Diagnostics", "EvenRows", "MatrixOptimizer", "ModelOptimizer", "Nesterov", "Polar"]
__all__ += ["RECIPES", "Split", "Technique", "WeightAverage", "activity", "cooked", "direction"]
__all__ += ["planned", "ramp", "recipe_settings", "split_parameters", "trapezoid"]
__all__ += [optimizer.__name__ for optimizer in OPTIMIZERS.values()]
