"""Measure, without a GPU, what the CUDA kernels need: registers, shared memory, spills, and the width of loads.

    python -m bench.gpu.kernel_resources [--write]

Compiles the CUDA kernels with nvcc and compares them with the budgets in bench/budgets/cuda.json; --write updates the
budgets, with the registers rounded up to a multiple of 8, which is how a GPU allocates them. Needs nvcc, and cuobjdump
from a CUDA toolkit or from the Triton package.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "bench/budgets/cuda.json"
ARCHITECTURES = ("80", "90", "100", "120")
SOURCES = sorted(ROOT.glob("csrc/*/cuda_kernels.cu"))
# Kernels that read a whole tensor load 16 bytes at a time if possible. Exceptions: kernels with a thread per position
# read number by number, and kernels that combine partial results read next to nothing.
NARROW = re.compile(r"^(finish|sum_images|stat_distance|(forward|backward)<\w+, \(Group\)0)")


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes of spill stores, spill loads and the stack frame


def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump() -> str | None:
    """Return the path of cuobjdump, or None."""
    found = importlib.util.find_spec("triton")
    bundled = Path(found.origin).parent / "backends/nvidia/bin" if found and found.origin else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


def architectures() -> list[str]:
    """Return those of ARCHITECTURES that the installed nvcc compiles for."""
    known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [architecture for architecture in ARCHITECTURES if f"sm_{architecture}" in known]


def readable(names: list[str]) -> list[str]:
    """Return mangled names of kernels as written in the source, with types but without namespaces."""
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"kdkernels::(cuda::)?(\(anonymous namespace\)::)?|_NV_ANON_NAMESPACE::", "", output)
    return [re.sub(r"^void |\([A-Z]\w+Call.*\)$", "", line) for line in plain.splitlines()]


def compile_kernels(source: Path, output: Path, names: list[str]) -> str:
    """Compile one file for some architectures and return what ptxas prints about its kernels."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    command = [nvcc(), "-O3", "-c", *code, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
    return result.stderr


def usages_in(text: str) -> dict[str, dict[str, Usage]]:
    """Parse the output of ptxas into resources by kernel and architecture."""
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        text,
        re.DOTALL,
    )
    result: dict[str, dict[str, Usage]] = {}
    for name, row in zip(readable([row[0] for row in found]), found, strict=True):
        spills = sum(map(int, row[2:5]))
        result.setdefault(name, {})[row[1]] = Usage(int(row[5]), int(row[6] or 0), spills)
    return result


def wide_loads_in(compiled: Path) -> dict[str, bool]:
    """Return, by kernel, whether its machine code for every architecture loads 16 bytes at a time."""
    listing = subprocess.run([cuobjdump(), "-sass", str(compiled)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", listing)[1:]
    names, bodies = readable(parts[::2]), parts[1::2]
    result: dict[str, bool] = {}
    for name, body in zip(names, bodies, strict=True):
        result[name] = result.get(name, True) and bool(re.search(r"\bLDG?\.E[\w.]*\.128", body))
    return result


def measure() -> tuple[dict[str, dict[str, Usage]], dict[str, bool]]:
    """Compile everything; return the resources of each kernel, and whether it loads 16 bytes at a time."""
    usages: dict[str, dict[str, Usage]] = {}
    wide: dict[str, bool] = {}
    names = architectures()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        outputs = {source: Path(folder) / f"{source.parent.name}.o" for source in SOURCES}
        # The largest file first, one architecture at a time, to keep two processors busy.
        jobs = [
            (source, outputs[source].with_suffix(f".{name}.o"), [name])
            for source in sorted(SOURCES, key=lambda path: -path.stat().st_size)
            for name in names
        ]
        for text in pool.map(lambda job: compile_kernels(*job), jobs):
            for kernel, by_architecture in usages_in(text).items():
                usages.setdefault(kernel, {}).update(by_architecture)
        for listing in pool.map(lambda job: wide_loads_in(job[1]), jobs):
            for kernel, is_wide in listing.items():
                wide[kernel] = wide.get(kernel, True) and is_wide
    return usages, wide


def complaints(usages: dict[str, dict[str, Usage]], wide: dict[str, bool], budgets: dict[str, dict]) -> list[str]:
    """Return a sentence for everything that breaks a budget."""
    result = [f"{kernel} has a budget, but no longer exists" for kernel in sorted(budgets.keys() - usages.keys())]
    for kernel, by_architecture in sorted(usages.items()):
        budget = budgets.get(kernel)
        if budget is None:
            result.append(f"{kernel} has no budget in {BUDGETS.relative_to(ROOT)}")
            continue
        for name, usage in by_architecture.items():
            allowed = budget["registers"].get(name, 0)
            if usage.spills:
                result.append(f"{kernel} spills {usage.spills} bytes on sm_{name}")
            if usage.registers > allowed:
                result.append(f"{kernel} takes {usage.registers} registers on sm_{name}; its budget is {allowed}")
            if usage.shared > budget["shared"]:
                what = f"{usage.shared} bytes of shared memory on sm_{name}"
                result.append(f"{kernel} takes {what}; its budget is {budget['shared']}")
        if not NARROW.match(kernel) and not wide[kernel]:
            result.append(f"{kernel} does not load 16 bytes at a time")
    return result


def write_budgets(usages: dict[str, dict[str, Usage]]) -> None:
    """Write the current resources as the budgets."""
    budgets = {
        kernel: {
            "registers": {name: -(-usage.registers // 8) * 8 for name, usage in sorted(by_architecture.items())},
            "shared": max(usage.shared for usage in by_architecture.values()),
        }
        for kernel, by_architecture in sorted(usages.items())
    }
    BUDGETS.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(kernel)}: {json.dumps(budget)}" for kernel, budget in budgets.items()]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, shared memory, spills and load width of the CUDA kernels.")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGETS.relative_to(ROOT)}")
    options = parser.parse_args()
    if nvcc() is None or cuobjdump() is None:
        sys.exit("needs nvcc, and cuobjdump (from a CUDA toolkit, or pip install triton)")
    usages, wide = measure()
    if options.write:
        write_budgets(usages)
    found = complaints(usages, wide, json.loads(BUDGETS.read_text()))
    print("\n".join(found) or f"{len(usages)} kernels within their budgets")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
