"""The command line: `micromix calibrate | plan | quantize | export | generate | eval | sweep | report | demo | env`.

Exit codes: 0 done, 1 the task failed (one line on stderr says why and what to do), 2 wrong usage, 130 interrupted.

`flags` has the parser, `inputs` and `outputs` what flags name, `plans` the plan that a command makes; the other files have a group of
commands each. What is imported within a function there brings transformers or matplotlib: seconds that `--help` and bad usage are spared.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from micromix_compile.cli.flags import make_parser
from micromix_compile.cli.inputs import check_device
from micromix_compile.cli.outputs import check_outputs
from micromix_compile.errors import MicroMixError, MicroMixWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 130 where ^C or SIGTERM ended it.

    Wrong usage raises SystemExit(2), as argparse does.
    """
    if hasattr(sys.stdout, "reconfigure"):  # else a letter that it lacks would end long work
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = make_parser().parse_args(argv)
    # transformers imports torchao where it is installed, which then tells of every file of its own that this torch cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), _terminated_as_interrupted():
        warnings.showwarning = _show_warning
        try:
            check_outputs(arguments)
            if arguments.command != "env":  # which is to tell what is wrong
                check_device(getattr(arguments, "device", None))
            return arguments.run(arguments) or 0
        except MicroMixError as error:
            print(f"micromix: error: {_one_line(error)}", file=sys.stderr)
            return 1
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"micromix: error: {where}{error.strerror or error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("micromix: interrupted", file=sys.stderr)
            return 130


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM removes temporary files too, unless somebody else has a say about it."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, MicroMixWarning):
        text = f"micromix: warning: {_one_line(message)}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
