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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kdkernels._version import __version__

INTERRUPTED = 130
REPEAT_AFTER = 0.5  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with _repeated_interrupts():
            return int(options.run(options))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, ImportError) as error:
        print(f"kdkernels {options.command}: {error}", file=sys.stderr)
        return 2


@contextmanager
def _repeated_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again until the command ends: Python drops one that is raised inside a destructor."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, REPEAT_AFTER)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
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
