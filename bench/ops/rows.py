"""What a benchmark records about a row, on a CPU or a GPU, besides its times."""

from collections.abc import Mapping
from typing import Any

from kdkernels.ops._cases import Workload
from kdkernels.testing.comparison import MODES, Contest


def info_of(workload: Workload, contest: Contest, mode: str, device: str, goals: Mapping[str, float]) -> dict[str, Any]:
    """Return the ``extra_info`` of a workload in a mode; the goals are for a forward with its backward."""
    passes = dict(zip(MODES, (*workload.passes[device], sum(workload.passes[device])), strict=True))[mode]
    return {
        "kind": "op", "op": workload.op, "function": workload.function, "shape": list(workload.shape),
        "dtype": str(workload.dtype).removeprefix("torch."), "variant": workload.variant, "mode": mode,
        "not_timed": contest.not_timed, "errors": contest.errors, "compile_seconds": contest.compile_seconds,
        "passes": passes, "bytes": passes * workload.tensor_bytes, "goals": dict(goals) if mode == "full" else {},
    }  # fmt: skip
