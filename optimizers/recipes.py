"""Recipes: published entries of modded-nanogpt's optimizer track as lists of techniques.

A recipe is an optimizer, the settings with which it was published, and what is left out. Steps in
the entries become shares of the run, so that a recipe may be run for fewer. The entries with their
losses: records/published; python train_gpt.py --recipe list prints the recipes.
"""

from dataclasses import dataclass

from .averages import Around, EmaNesterov, Extrapolation, ReadBack, WeightAverage
from .balance import Balance
from .contra import Contra
from .polar import Polar
from .schedules import hump, straight, trapezoid
from .size import Floor, MaskedDecay, RadialPin, RowFloor
from .slot import MatrixOptimizer
from .soap import Soap, age
from .technique import Aspect, Decay, Nesterov

BREAKS = 2386.4, 1413  # steps before a schedule's end at which matrices and AdamW start to fall


def powercool(steps: int, end: int, distance: float) -> dict:
    """Return trapezoid's arguments: constant until `distance` steps before `end`, then a fall with
    the power 1.2. Source: track_3#20."""
    return dict(cooldown=distance / steps, power=1.2, end=end / steps)


def schedules_of(steps: int, end: int, fall: int) -> dict:
    """Return the schedules of #30 and its successors; the momentum falls over the last steps."""
    rate = trapezoid(**powercool(steps, end, BREAKS[0]))
    return dict(lr=rate, momentum=hump(0.85 / 0.95, 300 / steps, fall / steps), soap_age=age)


class Tuned12(MatrixOptimizer):
    techniques = (Nesterov(), Polar(), Aspect(), Decay())
    defaults = dict(lr=0.035, weight_decay=0.025, polar="quintic12")


class Tuned36(Tuned12):
    defaults = dict(lr=0.025, weight_decay=0.05)


class Aurora17(MatrixOptimizer):
    techniques = (Nesterov(), Contra(Balance()), Aspect(), Floor())
    defaults = dict(lr=0.0375, floor=0.35, polar="quintic12")


class Aurora30(MatrixOptimizer):
    techniques = (Soap(Nesterov()), Contra(Balance(), falling=True), Aspect(), RadialPin(), Floor())
    defaults = dict(lr=0.0375, polar="quintic12", rounds=3, exponent=0.25, balance="proj")
    defaults |= dict(soap_every=10)
    schedules = schedules_of(3020, 3050, 100)
    schedules |= dict(contra=straight((0, 1.0), (2500 / 3020, 0.0)))


class Aurora34(Aurora30):
    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        return (Extrapolation(first=steps * 2820 // 3020),)


class Aurora38(Aurora30):
    schedules = schedules_of(2900, 3020, 100)
    schedules |= dict(contra=straight((0, 1.0), (2750 / 2900, 0.0)))
    schedules |= dict(brake=straight((2400 / 2900, 1.0), (1.0, 0.8)))  # 0.5 to 0.4
    schedules |= dict(floor=straight((2400 / 2900, 1.0), (2800 / 2900, 0.4 / 0.3825)))


class Aurora40(Aurora30):
    schedules = schedules_of(2900, 2980, 100)
    schedules |= dict(contra=straight((0, 1.0), (2500 / 2900, 0.0)))

    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        return (ahead(steps, 2980),)


class Aurora42(Aurora40):
    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        back = ReadBack(steps * 2375 // 2900, steps * 2850 // 2900)
        return ahead(steps, 2980), back


class Soap44(MatrixOptimizer):
    techniques = (Soap(Nesterov()), Polar(), Aspect(), RadialPin(), Floor())
    defaults = dict(lr=0.0375, polar="quintic12")
    schedules = schedules_of(2900, 2900, 200)
    schedules |= dict(gate_floor=straight((1375 / 2900, 1.0), (1625 / 2900, 0.0)))
    schedules |= dict(gate_cap=straight((1625 / 2900, 0.85), (1625 / 2900, 1.0)))

    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        return (ahead(steps, 2900),)


class Soap45(Soap44):
    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        return ahead(steps, 2900), tail(steps, 2000)


class Soap46(Soap44):
    techniques = (Soap(Nesterov()), Polar(), Aspect(), RadialPin(), RowFloor(), MaskedDecay())

    @staticmethod
    def around(steps: int) -> tuple[Around, ...]:
        return ahead(steps, 2900), tail(steps, 2400)


def tail(steps: int, first: int) -> WeightAverage:
    """Return #45's average of everything but the embedding, from a step of 2900 on."""
    span = max(1.0, 150 * steps / 2900)
    return WeightAverage(span, steps * first // 2900, mix=0.6, without=("embed",))


def ahead(steps: int, end: int) -> EmaNesterov:
    """Return #40's look-ahead, whose share follows the learning rate of the embedding."""
    factor = trapezoid(**powercool(2900, end, BREAKS[1]))
    return EmaNesterov(steps, steps * 300 // 2900, steps * 1950 // 2900, factor)


@dataclass(frozen=True)
class Recipe:
    """A published entry.

    steps are those of its schedules, `claimed` the step of its claim, `loss` its published mean
    there. `kind` is the optimizer of ours that it descends from, `settings` are --set's words,
    `initial` a name in models/initial.py, `apart` says which groups of the model are split.
    """

    optimizer: type[MatrixOptimizer]
    kind: str
    steps: int
    claimed: int
    loss: float
    settings: tuple[str, ...]
    initial: str = "plain"
    apart: tuple[str, ...] = ()
    left_out: str = "nothing"


LINEAR = "embed.lr=0.3", "head.lr=0.003125", "scalars.lr=0.01", "adamw.weight_decay=0.0"
SOAP30 = "attn_q.soap=off", "attn_k.soap=off", "attn_v.soap=floored", "attn_proj.soap=off"
SIGNS = "exact signs of the second half of the layers, AdamW instead of Adam without correction"


def cooled(steps: int, end: int) -> tuple[str, ...]:
    """Return the settings of AdamW from #30 on."""
    how = powercool(steps, end, BREAKS[1])
    return (*LINEAR, "adamw.betas=(0.8,0.99)", *(f"schedule.{k}={v}" for k, v in how.items()))


def of_30(optimizer: type, steps: int, end: int, claimed: int, loss: float, **more) -> Recipe:
    words = cooled(steps, end) + SOAP30
    return Recipe(
        optimizer, "aurora", steps, claimed, loss, words, apart=("attn",),
        **dict(initial="entry30") | more,
    )  # fmt: skip


def of_44(optimizer: type, claimed: int, loss: float) -> Recipe:
    words = *cooled(2900, 2900), "attn_proj.soap=gated"
    return Recipe(optimizer, "muon", 2900, claimed, loss, words, "entry44", ("attn",), SIGNS)


RECIPES = {
    "track_3#12": Recipe(Tuned12, "muon", 3350, 3325, 3.2790, LINEAR),
    "track_3#36": Recipe(Tuned36, "muon", 3250, 3250, 3.2787, ()),
    "track_3#17": Recipe(Aurora17, "aurora", 3200, 3175, 3.2789, LINEAR),
    "track_3#30": of_30(Aurora30, 3020, 3050, 2930, 3.2784),
    "track_3#34": of_30(Aurora34, 3020, 3050, 2925, 3.2781),
    "track_3#38": of_30(
        Aurora38, 2900, 3020, 2900, 3.2786, left_out="the tempered polar factor and the readouts"
    ),
    "track_3#40": of_30(Aurora40, 2900, 2980, 2890, 3.2788),
    "track_3#42": of_30(Aurora42, 2900, 2980, 2860, 3.2789, initial="entry42"),
    "track_3#44": of_44(Soap44, 2750, 3.2789),
    "track_3#45": of_44(Soap45, 2720, 3.2786),
    "track_3#46": of_44(Soap46, 2690, 3.2783),
}
NOT_HERE = {
    "track_3#10, #11": "their settings are not among our sources",
    "track_3#41, #43": "they couple attention's V and O of one layer, which no technique sees",
}


def recipe_settings() -> dict[str, tuple[dict, str]]:
    """Return by name the settings that a recipe stands for, and a line about it."""
    found = {}
    for name, one in RECIPES.items():
        about = f"{one.kind}, {one.claimed} steps to {one.loss:.4f} as published; "
        settings = dict(recipe=name, optimizer=one.kind, steps=one.steps, init=one.initial)
        found[name] = settings | dict(set=one.settings), f"{about}left out: {one.left_out}"
    return found


def cooked(
    name: str, optimizer: type[MatrixOptimizer], groups: list[dict]
) -> tuple[type[MatrixOptimizer], list[dict]]:
    """Return a recipe's optimizer, and groups in which those that it splits are apart.

    Parameters of a group are pairs (name, parameter); attn's become attn_q, attn_k and so on, by
    the last module in their names. Without a name both stay as they are.
    """
    if not name:
        return optimizer, groups
    recipe, apart = RECIPES[name], []
    if missing := set(recipe.apart) - {group["name"] for group in groups}:
        raise ValueError(f"{name} needs a group {missing.pop()}, which the model does not have")
    for group in groups:
        parts: dict[str, list] = {}
        for pair in group["params"] if group["name"] in recipe.apart else ():
            parts.setdefault(pair[0].split(".")[-2], []).append(pair)
        split = [group | dict(name=f"{group['name']}_{k}", params=v) for k, v in parts.items()]
        apart += split or [group]
    return recipe.optimizer, apart
