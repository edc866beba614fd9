"""`python -m records COMMAND ...`: show, compare, plot, pack and verify runs.

Bad input ends a command with one sentence and exit code 2, and nothing is written.
"""

import argparse
import sys
from importlib import import_module

COMMANDS = {  # each module has a docstring, add_arguments(parser) and run(args)
    "show": "records.show",
    "compare": "records.compare",
    "extract": "records.bundle",
    "pack": "records.pack",
    "plot": "records.plot",
    "report": "records.report",
    "verify": "records.verify",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m records", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    argv = sys.argv[1:] if argv is None else argv
    module = import_module(COMMANDS[parser.parse_args(argv[:1]).command])
    command = argparse.ArgumentParser(
        prog=f"python -m records {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    args = command.parse_args(argv[1:])
    try:
        module.run(args)
    except (ValueError, OSError) as error:
        command.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
