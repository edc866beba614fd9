"""`python -m records COMMAND ...`: show, compare, plot, pack and verify runs.

Bad input ends a command with one sentence and exit code 2, and nothing is written. A missing
package also gets one sentence and exit code 2.
"""

import argparse
import os
import sys
from importlib import import_module

from records.missing import advice

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
    name = parser.parse_args(argv[:1]).command
    try:
        module = import_module(COMMANDS[name])
        command = argparse.ArgumentParser(
            prog=f"python -m records {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        module.run(command.parse_args(argv[1:]))
    except ModuleNotFoundError as error:
        parser.exit(2, f"python -m records: {advice(error)}\n")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
