"""The command line: ``python -m kdkernels`` or ``kdkernels``.

Every module of this package without a leading underscore is a command: ``add_parser`` declares its options, and
``run`` executes it.
"""

import argparse
import importlib
import pkgutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from kdkernels._networks import NonFiniteLossError
from kdkernels._version import __version__

INTERRUPTED = 130
FAILED = 2
# What a user can run into. Anything else is a fault of the program, or of a network, and keeps its traceback.
EXPECTED = (ValueError, ImportError, OSError, NonFiniteLossError, torch.OutOfMemoryError)
_REMEDIES: dict[type[BaseException], str] = {torch.OutOfMemoryError: " Choose a smaller --batch-size."}
REPEAT_AFTER = 0.5  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with _repeated_interrupts(), warnings.catch_warnings():
            warnings.showwarning = _print_warning  # type: ignore[assignment]
            return int(options.run(options))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        reason = error.strerror if isinstance(error, OSError) and error.filename is None else None
        print(f"kdkernels {options.command}: {reason or error}{_REMEDIES.get(type(error), '')}", file=sys.stderr)
        return FAILED


def _print_warning(message: Warning | str, *_: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)


@contextmanager
def _repeated_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again until the command ends: Python drops one that is raised inside a destructor."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, REPEAT_AFTER)
        raise KeyboardInterrupt

    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdkernels", description="Knowledge distillation on fused kernels, with and without data."
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}").add_parser(commands)
    return parser
