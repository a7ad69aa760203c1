"""How a command ends: bad input is one line on stderr and status 2, not a traceback."""

import argparse
import sys
from collections.abc import Callable, Sequence

FAILURES = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def debug_option() -> argparse.ArgumentParser:
    """Parent parser with the option that every command has."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parent


def config_options() -> argparse.ArgumentParser:
    """Parent parser with the options of every command that reads a config."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override config entries"
    )
    parent.add_argument(
        "--safe",
        action="store_true",
        help="a config is Python and runs as code when it is read, and overrides may name any function; with --safe "
        "only configs of the package are read, by name, and overrides are plain data",
    )
    return parent


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status is 2 after an error and 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return main(arguments)
    except KeyboardInterrupt as interruption:
        sys.stderr.write(f"vision-ssm: {str(interruption) or 'interrupted'}\n")
        return 130
    except FAILURES as error:
        if "--debug" in arguments:
            raise
        sys.stderr.write(f"vision-ssm: error: {' '.join(str(error).split())}\n")
        return 2
