"""The command line: `subnet-ft COMMAND`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from subnet_ft.cli.parser import parse
from subnet_ft.cli.results import UNEXPECTED, WRONG_INPUT, stdout_for_results
from subnet_ft.cli.studying import study
from subnet_ft.cli.training import run, train
from subnet_ft.errors import SubnetError

logger = logging.getLogger(__name__)

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`results.py`); only an unexpected error shows a traceback."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # What transformers deprecates inside TRL is nothing that a user of this command can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)(\.|$)")
    # PEFT names the cache of a learned prefix as transformers did before 5.24.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    logging.getLogger("subnet_ft").setLevel(logging.WARNING if options.quiet else logging.INFO)
    try:
        with stdout_for_results() as emit:
            code: int = options.command(options, emit)
            return code
    except SubnetError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_INPUT
    except OSError as error:
        named = f"{error.strerror}: `{error.filename}`" if error.strerror and error.filename else str(error)
        sys.stderr.write(f"{named or type(error).__name__}\n")
        return WRONG_INPUT
    except KeyboardInterrupt:
        goes_on = " The same command goes on from here." if options.command in (run, train, study) else ""
        sys.stderr.write(f"\nInterrupted.{goes_on}\n")
        return 130
    except Exception:  # a bug, or something that torch, transformers or TRL refuses
        logger.exception("Unexpected error. If it is not yours, report it with the output of `subnet-ft env`:")
        return UNEXPECTED
