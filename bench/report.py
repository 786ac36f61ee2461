"""Time every op against eager PyTorch and torch.compile, all in one run, and write build/bench/.

    python bench/report.py [--threads 2] [--only text] [--output build/bench]

Every row is a forward and a backward to fresh gradients; the ratios are of medians. The three take turns, and in
each turn are called a few times in a row, as in a training loop. A goal that is missed is marked.
"""

import argparse
import json
from pathlib import Path

import torch
from roofline import copy_bandwidth, floor_seconds
from workloads import runnable

import kdkernels
from kdkernels.cases import workloads
from kdkernels.timing import interleaved_medians

HEAD = (
    "workload", "ours ms", "eager ms", "compile ms", "x eager (goal)", "x compile (goal)", "MB moved", "GB/s",
    "of copy", "floor ms", "of it fresh pages",
)  # fmt: skip


def measure(workload, bandwidth, rounds):
    functions = runnable(workload)
    times = interleaved_medians(functions, rounds=rounds)
    tensors = workload.make()
    floor, fresh = floor_seconds(tensors, [tensors[i] for i in workload.differentiable])
    moved = workload.read + workload.write
    return {
        "workload": workload.name,
        "seconds": times,
        "speedup_over_eager": times["eager"] / times["kdkernels"],
        "speedup_over_compile": times["compile"] / times["kdkernels"],
        "goals": workload.goals,
        "bytes_moved": moved,
        "bytes_per_second": moved / times["kdkernels"],
        "share_of_copy_bandwidth": moved / times["kdkernels"] / bandwidth,
        "floor_seconds": floor,
        "fresh_page_seconds": fresh,
    }


def cells(row):
    def ratio(value, goal):
        return f"{value:.1f} ({goal:g}){'' if value >= goal else ' MISSED'}"

    ms = {name: f"{1e3 * seconds:.2f}" for name, seconds in row["seconds"].items()}
    return (
        row["workload"], ms["kdkernels"], ms["eager"], ms["compile"],
        ratio(row["speedup_over_eager"], row["goals"][0]), ratio(row["speedup_over_compile"], row["goals"][1]),
        f"{row['bytes_moved'] / 1e6:.1f}", f"{row['bytes_per_second'] / 1e9:.1f}",
        f"{100 * row['share_of_copy_bandwidth']:.0f} %", f"{1e3 * row['floor_seconds']:.2f}",
        f"{1e3 * row['fresh_page_seconds']:.2f}",
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Time every op against eager PyTorch and torch.compile.")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=15, help="of each workload (default: 15)")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default: build/bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth()
    print(f"{options.threads} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s (reads and writes)", flush=True)
    rows = []
    for workload in workloads():
        if options.only in workload.name:
            rows.append(measure(workload, bandwidth, options.rounds))
            print(" | ".join(f"{h}: {c}" for h, c in zip(HEAD, cells(rows[-1]), strict=True)), flush=True)
    table = [HEAD, ("---",) * len(HEAD), *map(cells, rows)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"threads": options.threads, "copy_bandwidth": bandwidth, "rows": rows, "build": kdkernels.build_info()}
    (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "report.md").write_text(text)
    print(f"\n{text}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
