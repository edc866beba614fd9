"""Options: the settings of a run, from flags, from a preset or from a file of one's own.

Settings are the fields of a frozen dataclass, each made by `setting`. The standard library only, as
every log holds this file.
"""

import argparse
import ast
import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, field, fields
from pathlib import Path

SCOPES = {  # of flags: their headings in --help
    "run": "what is trained (a checkpoint is resumed with the same)",
    "": "how it is run and measured",
    "free": "seeds, devices and files (none changes a seed's loss)",
}
NESTED = "model", "schedule"  # scopes whose settings are changed by --set scope.name=value


def setting(default: object, scope: str, help: str = "", least: int | None = None) -> object:
    """Return a field of the settings; `help` makes it a flag.

    An integer has at least the value `least`: 0 if that is its default, else 1. To use a
    checkpoint, scope "model" must be equal; to resume it "run" and "schedule" as well; to compare
    runs "" too. "free" changes no loss.
    """
    least = min(1, default) if least is None and type(default) is int else least
    return field(default=default, metadata=dict(scope=scope, help=help, least=least))


class Settings:
    """Base of the dataclass of settings."""

    def scoped(self, *scopes: str) -> dict:
        """Return the settings of these scopes."""
        found = [f.name for f in fields(self) if f.metadata["scope"] in scopes]
        return {name: getattr(self, name) for name in found}


def read_options(
    argv: list[str],
    kind: type[Settings],
    presets: dict[str, dict],
    fixed: tuple[str, ...],
    choices: dict,
    recipes: dict[str, tuple[dict, str]],
    saved: Callable[[Path], dict[str, dict]],
) -> Settings:
    """Return the settings that these words describe: a preset, then a file, then flags.

    Args:
        kind: the dataclass of settings, with `preset` and `set` among them.
        presets: settings by the preset's name.
        fixed: the presets whose model is part of what they compare.
        choices: the values that a flag may have, by its name.
        recipes: by name the settings that --recipe stands for, and a line about it.
        saved: reads a checkpoint, with its settings as "config"; --eval takes these over.

    Raises ValueError or FileNotFoundError with one sentence. --print-config and --help print and
    exit.
    """
    named, _ = make_parser().parse_known_args(argv)
    base = read_settings(named.config, kind) if named.config else {}
    if named.eval:
        base = shared(saved(named.eval)["config"], kind) | base
        if named.preset not in (None, base["preset"]):
            raise ValueError(
                f"{named.eval} has preset {base['preset']}, found {named.preset}: leave it out"
            )
    name = named.preset or base.get("preset", kind.preset)
    recipe = recipe_named(named.recipe, recipes)
    base = presets.get(name, {}) | dict(preset=name) | recipe | base
    known = dict(preset=presets, **choices)
    given = vars(flags_parser(kind(**base), known).parse_args(argv))
    if given.pop("config", None):
        given.pop("preset", None)  # named the settings that the file changes
    printed = given.pop("print_config", False)
    changes, others = nested_changes((*base.get("set", ()), *given.pop("set", ())), kind)
    options = kind(**base | given | changes | dict(set=others))
    if recipe and options.optimizer != recipe["optimizer"]:
        raise ValueError(
            f"{named.recipe} is a recipe of {recipe['optimizer']}, found optimizer "
            f"{options.optimizer}: leave one of them out"
        )
    before = kind(**presets.get(options.preset, {})).scoped("model")
    check_options(options, choices, before if options.preset in fixed else {})
    if printed:
        print(json.dumps(shared(asdict(options), kind), indent=2))
        sys.exit(0)
    return options


def check_options(options: Settings, choices: dict, fixed: dict) -> None:
    """Raise ValueError for a value that is not allowed, or none of those that are fixed."""
    for name, allowed in choices.items():  # a file or a checkpoint may have another
        if (found := getattr(options, name)) not in allowed:
            raise ValueError(f"{name} is {found!r}, expected one of {', '.join(allowed)}")
    for f in fields(options):
        least, found = f.metadata["least"], getattr(options, f.name)
        if least is not None and found < least:
            raise ValueError(f"{f.name} is {found}, expected {least} or more")
    for name, value in fixed.items():
        if (found := getattr(options, name)) != value:
            raise ValueError(
                f"{options.preset} has model.{name} {value}, found {found}: choose --preset demo, "
                "or a --config file with a preset's name of your own"
            )


def make_parser(**options: object) -> argparse.ArgumentParser:
    """Return a parser; without options, of the flags that name other settings alone."""

    def fail(message: str) -> None:
        raise ValueError(f"{message}; see python train_gpt.py --help")

    parser = argparse.ArgumentParser(add_help=bool(options), allow_abbrev=False, **options)
    parser.error = fail  # the caller prints one sentence, on one rank
    if not options:
        parser.add_argument("--preset")
        parser.add_argument("--config", type=Path)
        parser.add_argument("--eval", type=Path)
        parser.add_argument("--recipe")
    return parser


def flags_parser(defaults: object, choices: dict) -> argparse.ArgumentParser:
    """Return a parser of all flags, which says the defaults and returns what is given only."""
    parser = make_parser(description="GPT-2 124M speedrun", argument_default=argparse.SUPPRESS)
    actions = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(action="append")}
    for scope, title in SCOPES.items():
        group = parser.add_argument_group(title)
        for f in fields(defaults):
            if f.metadata["scope"] != scope or not f.metadata["help"]:
                continue
            names = ["--" + f.name.replace("_", "-")] + ["--log-file"] * (f.name == "log")
            parsed = actions.get(f.type, dict(type=f.type, choices=choices.get(f.name)))
            default = getattr(defaults, f.name)
            said = f" (default: {default})".replace("%", "%%") if default not in ("", ()) else ""
            group.add_argument(*names, help=f.metadata["help"] + said, **parsed)
    group.add_argument("--config", type=Path, help="JSON file, or log, of settings: your preset")
    group.add_argument("--print-config", action="store_true", help="print such a file and exit")
    return parser


def recipe_named(name: str | None, recipes: dict[str, tuple[dict, str]]) -> dict:
    """Return the settings of a recipe, none without a name; "list" prints all and exits."""
    if not name:
        return {}
    if name == "list":
        print("\n".join(f"{known}: {about}" for known, (_, about) in recipes.items()))
        sys.exit(0)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, cutoff=0.3) or recipes
        raise ValueError(f"no recipe {name}: did you mean {', '.join(near)}? See --recipe list")
    return recipes[name][0]


def read_settings(path: Path, kind: type) -> dict:
    """Return the settings in a JSON object, or those of the run that wrote a log."""
    known = {f.name: f for f in fields(kind)}
    try:
        text = path.read_text()
        meta = [line[6:] for line in text.splitlines() if line.startswith("meta: {")]
        found = json.loads(meta[0])["config"] if meta else json.loads(text)
        found = dict(found.items())
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"--config {path}: expected a JSON object as --print-config writes it, found: {error}"
        ) from None
    if meta:
        found = shared(found, kind)
    if unknown := sorted(found.keys() - known.keys()):
        raise ValueError(f"--config {path}: {unknown[0]!r} is none of {', '.join(known)}")
    found = {k: converted(v, known[k].default, f"--config {path}: {k}") for k, v in found.items()}
    return dict(preset=path.stem) | found


def shared(settings: dict, kind: type) -> dict:
    """Return the settings that other runs may take over: not those of seeds, devices and files."""
    names = [f.name for f in fields(kind) if f.metadata["scope"] != "free"] + ["data", "get_data"]
    return {name: settings[name] for name in names if name in settings}


def nested_changes(settings: tuple[str, ...], kind: type) -> tuple[dict, tuple[str, ...]]:
    """Split --set's words into new values of fields, and the words for the optimizer."""
    changes, others = {}, ()
    for words in settings:
        where, _, text = words.partition("=")
        scope, _, name = where.partition(".")
        if scope not in NESTED:
            others += (words,)
            continue
        known = {f.name: f.default for f in fields(kind) if f.metadata["scope"] == scope}
        if name not in known:
            raise ValueError(f"--set {words}: names of {scope}: {', '.join(known)}")
        try:
            value = text if isinstance(known[name], str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        changes[name] = converted(value, known[name], f"--set {words}")
    return changes, others


def converted(value: object, like: object, where: str) -> object:
    """Return a value as the type of the default; ValueError if it is of another."""
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list) and all(type(v) is str for v in value):
        value = tuple(value)
    if type(value) is not type(like):
        raise ValueError(f"{where}: found {value!r}, expected a value like {like!r}")
    return value
