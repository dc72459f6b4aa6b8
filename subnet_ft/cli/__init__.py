"""The command line: `subnet-ft COMMAND`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from subnet_ft import processes
from subnet_ft.cli.parser import parse
from subnet_ft.cli.results import UNEXPECTED, WRONG_INPUT, printable, stdout_for_results
from subnet_ft.cli.studying import study
from subnet_ft.cli.training import run, train
from subnet_ft.errors import SubnetError

logger = logging.getLogger(__name__)

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`results.py`); only an unexpected error shows a traceback.

    Of the processes of a launch the first writes the result. All have one exit code; one that fails ends at once, since
    taking down its part of a process group could wait for processes that wait for it.
    """
    options = parse(arguments)
    who = f"[process {processes.rank()}] " if processes.rank() > 0 else ""
    logging.basicConfig(level=logging.WARNING, format=f"{who}%(message)s", stream=sys.stderr)
    # What transformers deprecates inside TRL is nothing that a user of this command can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)(\.|$)")
    # PEFT names the cache of a learned prefix as transformers did before 5.24.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    is_quiet = options.quiet or not processes.is_first()
    logging.getLogger("subnet_ft").setLevel(logging.WARNING if is_quiet else logging.INFO)
    code, error = _run(options, who)
    if error is None:
        processes.leave()
    elif processes.fail(error):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(options: argparse.Namespace, who: str) -> tuple[int, BaseException | None]:
    """Run the command; what fails is written to stderr, each line of an expected error behind `who`."""
    try:
        with stdout_for_results() as emit:
            return options.command(options, emit if processes.is_first() else _drop), None
    except SubnetError as error:
        sys.stderr.write(who + printable(str(error), keep="\n\t") + "\n")
        return WRONG_INPUT, error
    except OSError as error:
        named = f"{error.strerror}: `{error.filename}`" if error.strerror and error.filename else str(error)
        sys.stderr.write(f"{who}{named or type(error).__name__}\n")
        return WRONG_INPUT, error
    except KeyboardInterrupt as error:
        goes_on = " The same command goes on from here." if options.command in (run, train, study) else ""
        sys.stderr.write(f"\n{who}Interrupted.{goes_on}\n")
        return 130, error
    except Exception as error:  # a bug, or something that torch, transformers or TRL refuses
        logger.exception("Unexpected error. If it is not yours, report it with the output of `subnet-ft env`:")
        return UNEXPECTED, error


def _drop(text: str) -> None:
    """Take a result that the first process writes."""
