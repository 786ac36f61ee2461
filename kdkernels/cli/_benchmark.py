"""``python -m kdkernels bench``: one function on a shape of one's own, against PyTorch."""

from statistics import median

import torch

from kdkernels.ops._cases import Workload
from kdkernels.testing.comparison import COMPILE, MODES, SMALL, Contest, enter, peak_bytes
from kdkernels.testing.timing import Clock, DeviceClock, HostClock, interleaved_rounds, pairwise_ratio


def benchmark(workload: Workload, device: str, *, compiles: bool = True, seconds: float = 3.0) -> str:
    """Check our results, time them against eager PyTorch and ``torch.compile``, and return a report in Markdown.

    Args:
        workload: what is computed.
        device: ``"cpu"`` or ``"cuda"``.
        compiles: whether ``torch.compile`` takes part; it takes some seconds to compile.
        seconds: spent on each of forward, backward and both.

    Raises:
        RuntimeError: our result is wrong, or there is none.

    """
    contest = enter(workload, device, {"kdkernels": "auto"}, {}, COMPILE if compiles else {})
    if not contest.passes:
        raise RuntimeError(f"{workload.name}: {contest.not_timed['kdkernels']}; nothing was timed")
    cold = workload.tensor_bytes >= SMALL
    clock: Clock = DeviceClock() if device == "cuda" else HostClock()
    state = "inputs from memory" if cold or device == "cuda" else "inputs from caches"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{workload.name} on {where}, {state}; median ms, and how many times as long as kdkernels",
        "with the 10th to 90th percentile of the rounds:",
        "",
        "| | forward | backward | both | beyond the inputs | relative error |",
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


def _memory(contest: Contest, name: str, device: str) -> str:
    passes = contest.passes[name]
    passes.clear()
    peak = peak_bytes(passes.full, device)
    passes.clear()
    return f"{peak / 1e6:.1f} MB"
