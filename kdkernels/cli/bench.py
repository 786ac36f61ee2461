"""``python -m kdkernels bench``: one function on a shape of your own, timed against PyTorch."""

import argparse
from statistics import median
from typing import TYPE_CHECKING

import torch

from kdkernels.cli._options import Commands, positive
from kdkernels.ops._cases import SHORT_NAMES, Workload, workload, workload_functions
from kdkernels.testing.timing import Clock, DeviceClock, HostClock, interleaved_rounds, pairwise_ratio

if TYPE_CHECKING:
    from kdkernels.testing.comparison import Contest

_DTYPES = {name: dtype for dtype, name in SHORT_NAMES.items()}


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("bench", help="time a function on a shape of your own against PyTorch")
    functions = list(workload_functions())
    parser.add_argument("--op", required=True, choices=functions, metavar="FUNCTION", help=", ".join(functions))
    parser.add_argument(
        "--shape", required=True, type=positive, nargs="+", metavar="SIZE",
        help="shape of the logits (classes last), the images [B C H W] or the activation [N C ...]",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--variant", default="", help='"dim=1" for logits [B, C, ...], "channels_last" for activations')
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes seconds")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table of times."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch finds no CUDA device; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    one = workload(options.op, options.shape, _DTYPES[options.dtype], options.variant)
    print(benchmark(one, options.device, compiles=not options.no_compile))
    return 0


def benchmark(workload: Workload, device: str, *, compiles: bool = True, seconds: float = 3.0) -> str:
    """Check our results, time them against eager PyTorch and ``torch.compile``, and return a report in Markdown.

    Args:
        workload: Row of the benchmark.
        device: ``"cpu"`` or ``"cuda"``.
        compiles: Whether to include ``torch.compile``, which takes some seconds to compile.
        seconds: Time spent on each of forward, backward and both.

    Raises:
        RuntimeError: If our result is wrong or the call fails.

    """
    from kdkernels.testing.comparison import COMPILE, MODES, SMALL, enter

    contest = enter(workload, device, {"kdkernels": "auto"}, {}, COMPILE if compiles else {})
    if not contest.passes:
        raise RuntimeError(f"{workload.name}: {contest.not_timed['kdkernels']}; nothing was timed")
    cold = workload.tensor_bytes >= SMALL
    clock: Clock = DeviceClock() if device == "cuda" else HostClock()
    state = "inputs from memory" if cold or device == "cuda" else "inputs from caches"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{workload.name} on {where}, {state}; median ms, and the time relative to kdkernels",
        "with the 10th to 90th percentile of the rounds:",
        "",
        "| | forward | backward | both | memory beyond the inputs | relative error |",
        "|---|---|---|---|---|---|",
    ]
    rounds = {
        mode: interleaved_rounds({name: one.timed()[mode] for name, one in contest.passes.items()}, clock,
                                 seconds=seconds)
        for mode in MODES
    }  # fmt: skip
    for name in contest.passes:
        cells = [_cell(rounds[mode], name) for mode in MODES]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {_memory(contest, name, device)} | {contest.errors[name]:.0e} |"
        )
    lines += [f"\n{name} was not timed: {reason}" for name, reason in contest.not_timed.items()]
    passes = sum(workload.passes[device])
    speed = passes * workload.tensor_bytes / median(rounds["full"]["kdkernels"])
    lines.append(f"\n{passes} passes over {workload.tensor_bytes / 1e6:.1f} MB: {speed / 1e9:.1f} GB/s")
    return "\n".join(lines)


def _cell(rounds: dict[str, list[float]], name: str) -> str:
    text = f"{1e3 * median(rounds[name]):.3f}"
    if name == "kdkernels":
        return text
    ratio = pairwise_ratio(rounds["kdkernels"], rounds[name])
    spread = f"x {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{text}, {spread}{', a tie' if ratio.verdict == 'tie' else ''}"


def _memory(contest: "Contest", name: str, device: str) -> str:
    from kdkernels.testing.comparison import peak_bytes

    passes = contest.passes[name]
    passes.clear()
    peak = peak_bytes(passes.full, device)
    passes.clear()
    return f"{peak / 1e6:.1f} MB"
