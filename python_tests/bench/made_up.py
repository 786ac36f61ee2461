"""Benchmark results whose verdicts can be checked by hand."""

OURS = [0.001, 0.002, 0.001, 0.002, 0.001]


def row(function="kl_div_with_logits", **changes):
    info = {
        "kind": "op", "op": "softmax_divergence", "function": function, "shape": [256, 1000], "dtype": "float32",
        "variant": "dim=1", "mode": "full",
        "rounds": {
            "kdkernels": OURS,
            "eager": [0.004, 0.008, 0.004, 0.008, 0.004],  # 4 in every round, though the machine's speed changed
            "compile": [0.0009, 0.0024, 0.001, 0.0018, 0.0012],  # 0.9, 1.2, 1, 0.9, 1.2: a tie
            "compile max-autotune": [0.0005, 0.001, 0.0005, 0.001, 0.0005],  # half of our time
        },
        "not_timed": {"liger": "needs a GPU"}, "errors": {"kdkernels": 1e-7, "eager": 2e-7}, "bytes": 2_000_000,
        "passes": 3, "peak_bytes": {"kdkernels": 4096, "eager": 3e6}, "compile_seconds": {"compile": 8.125},
        "goals": {"faster than eager": 5.0, "faster than compile": 0.4}, "cold": True,
    }  # fmt: skip
    info.update(changes)
    return {"name": f"test_op[{function}]", "extra_info": info}


def sweep(**changes):
    values = [64, 128, 256, 512]
    ours = {"64": [1e-4] * 3, "128": [1.5e-4] * 3, "256": [3e-4] * 3, "512": [9e-4] * 3}
    info = {
        "kind": "sweep", "sweep": "kl_div_with_logits, batch", "parameter": "batch", "values": values, "unit": "rows",
        "rounds": {"kdkernels": ours, "eager": {str(v): [1e-5 * v] * 3 for v in values}}, "expected_slope": 1.0,
    }  # fmt: skip
    return {"name": "test_sweep", "extra_info": {**info, **changes}}


def result(*benchmarks):
    return {
        "environment": {
            "command": "make bench", "date": "2026-01-02", "commit": "abc123+changes", "machine": "A <fast> machine",
            "cores": 2, "threads": 2, "memory_bytes": 8 << 30, "caches": {"L2": 1 << 20}, "torch": "2.13.0",
            "device": "cpu", "rivals": {"kornia": "0.9.0", "liger": "not installed"},
        },
        "roofline": {"copy_bytes_per_second": 4e9},
        "benchmarks": list(benchmarks),
    }  # fmt: skip


ROUTINE = row("deep_inversion", kind="routine", op=None, mode="step", goals={})
FAILED = row("broken", failed="relative error 3e-1, allowed 1e-3", op="total_variation")
EVERYTHING = result(row(), ROUTINE, FAILED, sweep())
