"""One sentence in place of a traceback where a package is not installed.

Scripts call `explain_missing` before they import packages. Standard library only.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType


def advice(error: ModuleNotFoundError) -> str:
    """Return what is missing in which Python, and what to run."""
    name = (error.name or "").partition(".")[0]
    return (
        f"{sys.executable} has no {name}: run `source .venv/bin/activate`, or ./run.sh if there is "
        f"no .venv (it makes one where python3 lacks packages), or `pip install {name}`"
    )


def explain_missing() -> None:
    """From now on, end the program with one sentence and code 2 if a package is missing."""
    sys.excepthook = explain


def explain(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Exit with the sentence if the error is a missing package, else show the traceback."""
    missing = isinstance(error, ModuleNotFoundError) and error.name
    if not missing or find_spec(error.name.partition(".")[0]):  # a part of what is here
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name}: {advice(error)}", file=sys.stderr)
    raise SystemExit(2)
