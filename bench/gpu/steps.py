"""The steps of run.py except the benchmark, each in a separate process: python -m bench.gpu.steps STEP.

The environment says which part of the report a step writes (KDKERNELS_PART), how long it may take (KDKERNELS_SECONDS),
where the package is built (KDKERNELS_WORK), and whether it is a dry run, which uses no device (KDKERNELS_DRY).
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu.part import Part
from bench.gpu.run import CUT, NOT_AVAILABLE, PASSED, ROOT

FAILED = 1
DRY = os.environ.get("KDKERNELS_DRY") == "1"
WORK = Path(os.environ.get("KDKERNELS_WORK", ROOT / "build/gpu-work"))
BEGUN = time.monotonic()
CORES = machine.cores()
NO_DEVICE = "this PyTorch cannot use a CUDA device; `make gpu DRY=1` runs what needs none"


def seconds_left(reserve: float = 6.0) -> float:
    """Return the seconds left to the step, minus a reserve for an orderly end."""
    return float(os.environ.get("KDKERNELS_SECONDS", "600")) - reserve - (time.monotonic() - BEGUN)


def output_of(*command: str, seconds: float = 15.0) -> str | None:
    """Return what a command printed, or None if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit: on PATH, or in the usual places."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    found = (shutil.which(name, path=path) for path in (None, *map(str, folders)))
    return next((path for path in found if path), None)


# Environment


def environment(part: Part) -> int:
    try:
        import torch
    except ImportError as error:
        part.add(summary=f"{sys.executable} cannot import PyTorch ({error}); name one that can: make gpu PYTHON=...")
        return FAILED
    names = ("triton", "pytest", "hypothesis", "ninja", "pybind11", "setuptools", "liger-kernel", "matplotlib")
    nvcc = find_tool("nvcc")
    found = re.search(r"release ([\d.]+)", (output_of(nvcc, "--version") or "") if nvcc else "")
    release = found.group(1) if found else "unknown" if nvcc else "not installed"
    facts: dict[str, Any] = {
        **machine.facts("make gpu"), "torch": torch.__version__, "torch_cuda": torch.version.cuda,
        **{name: version_of(name) for name in names}, "nvcc": f"{release} ({nvcc})" if nvcc else release,
        **{name: find_tool(name) or "not installed" for name in ("compute-sanitizer", "ncu")},
    }  # fmt: skip
    if not torch.cuda.is_available():
        part.add(environment=facts, summary=f"no GPU, torch {torch.__version__}" if DRY else NO_DEVICE)
        return PASSED if DRY else FAILED
    gpu = torch.cuda.get_device_properties(0)
    facts |= {
        "device": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "devices": torch.cuda.device_count(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "device_memory_gib": round(gpu.total_memory / 2**30, 1), "multiprocessors": gpu.multi_processor_count,
        "l2_cache_mib": round(gpu.L2_cache_size / 2**20, 1),
    }  # fmt: skip
    part.add(environment=facts, summary=f"{gpu.name}, torch {torch.__version__}, nvcc {release}")
    return PASSED


def version_of(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# Build


def build(part: Part) -> int:
    """Compile into a separate folder, for the GPU of this machine, and import the result."""
    import torch

    site, package = WORK / "site", WORK / "site/kdkernels"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "kdkernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    mode, variables, start = "cpu" if DRY else "cuda", {}, time.monotonic()
    if DRY:
        part.add(would_build=f"the CUDA kernels too, with {find_tool('nvcc') or 'nvcc, which is not installed'}")
        # Reuse the library that `make test` built, if it is for this interpreter.
        for library in (ROOT / "kdkernels").glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
            shutil.copy2(library, package)
            part.add(reused=str(library.relative_to(ROOT)))
    else:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        variables = {"TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(CORES)}
    if not list(package.glob("_C.*.so")):
        command = ["setup.py", "build_ext", "--build-lib", str(site), "--build-temp", str(WORK / "objects")]
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **variables, "KDKERNELS_BUILD": mode}
        )
        part.add(seconds=round(time.monotonic() - start, 1), command=" ".join(command), **variables)
        if result.returncode:
            part.add(summary=f"`{' '.join(command)}` failed, see its log")
            return FAILED
    code = "import json, kdkernels; print(json.dumps(kdkernels.build_info()))"
    info = output_of(sys.executable, "-c", code, seconds=60)
    if info is None:
        part.add(summary="the built package cannot be imported")
        return FAILED
    information = json.loads(info.splitlines()[-1])
    part.add(build_info=information, summary=f"{', '.join(information['compiled']) or 'nothing'} in {WORK}")
    return PASSED if {"_C"} | ({"_cuda"} if not DRY else set()) <= set(information["compiled"]) else FAILED


# Correctness

CONTRACT = "equals_reference or inputs_are_not_written or order_of_work or gradcheck or second_backward"


@dataclass
class TestRun:
    """A run of pytest, and its results."""

    name: str
    target: str
    keyword: str = ""
    folder: str = "ops"
    process: subprocess.Popen | None = None
    cut: bool = False

    def start(self, folder: Path) -> None:
        self.results = folder / f"{self.name}-{self.target}.jsonl"
        self.log = self.results.with_suffix(".txt")
        self.results.unlink(missing_ok=True)
        options = ["-q", "-p", "bench.gpu.results_plugin", "-p", "no:cacheprovider"]
        options += ["-q", "--collect-only"] if DRY else [f"--junitxml={self.results.with_suffix('.xml')}"]
        options += ["-k", self.keyword] if self.keyword else []
        # A dry run collects the tests for the CPU: for a GPU, their inputs would be moved there.
        variables = {"KDKERNELS_TEST_TARGET": "cpu" if DRY else self.target, "OMP_NUM_THREADS": "2"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"python_tests/{self.folder}/test_{self.name}.py"],
                cwd=ROOT, env={**os.environ, **variables, "KDKERNELS_TEST_RESULTS": str(self.results)},
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        lines = self.results.read_text().splitlines() if self.process and self.results.exists() else []
        entries = [json.loads(line) for line in lines]
        outcomes = [entry for entry in entries if "outcome" in entry]
        failures = [entry for entry in outcomes if entry["outcome"] == "failed"]
        code = self.process.poll() if self.process else None
        state = "not begun" if self.process is None else "cut" if self.cut else "running" if code is None else "passed"
        if failures or (code not in (None, 0, 5) and not self.cut):  # 5: no tests were collected
            state = "failed"
        broken = state == "failed" and not failures
        return {
            "name": self.name, "target": self.target, "state": state, "exit_status": code,
            "log_tail": self.log.read_text(errors="replace")[-1500:] if broken else "",
            "passed": sum(entry["outcome"] == "passed" for entry in outcomes),
            "failed": len(failures),
            "skipped": sum(entry["outcome"] == "skipped" for entry in outcomes),
            "collected": next((entry["collected"] for entry in entries if "collected" in entry), 0),
            "seconds": sum(entry["seconds"] for entry in outcomes),
            "failures": [{"test": e["test"], "message": e["message"]} for e in failures[:50]],
            "skip_reasons": sorted({e["message"] for e in outcomes if e["outcome"] == "skipped"})[:20],
        }  # fmt: skip


def correctness(part: Part) -> int:
    """Run the tests, the most important first, in parallel if there are enough processors."""
    ops = [path.parent.name for path in sorted((ROOT / "kdkernels/ops").glob("*/cases.py"))]
    runs = [TestRun("gpu", "cuda", folder="gpu"), TestRun("gpu_emulator", "cuda", folder="gpu")]
    runs += [TestRun(op, "cuda", CONTRACT) for op in ops]
    runs += [TestRun(name, "cuda", folder="gpu") for name in ("gpu_memory", "gpu_inversion")]
    runs += [TestRun(op, "cuda-triton", "equals_reference") for op in ops]
    if DRY:
        runs = [run for run in runs if run.target == "cuda"]
    at_once = CORES - 2 if CORES >= 8 else 1
    folder = WORK / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    warming = warm_up_compiler() if CORES >= 8 and not DRY else None
    waiting, running = list(runs), []
    while (waiting or running) and seconds_left() > 0:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].start(folder)
        time.sleep(0.5)
        running = [run for run in running if run.process.poll() is None]
        part.add(runs=[run.summary() for run in runs])
    for run in running:
        run.process.send_signal(signal.SIGINT)  # pytest then reports the finished tests
        run.cut = True
    for run in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(max(seconds_left(reserve=3.0), 0.0))
        run.process.kill()
    if warming is not None:
        warming.kill()
    results = [run.summary() for run in runs]
    counts = {key: sum(result[key] for result in results) for key in ("passed", "failed", "skipped", "collected")}
    part.add(runs=results, summary=", ".join(f"{number} {key}" for key, number in counts.items()))
    if any(result["state"] == "failed" for result in results):
        return FAILED
    return CUT if running or waiting else PASSED


def warm_up_compiler() -> subprocess.Popen:
    """Fill the cache of torch.compile while the tests run: the benchmark does not time compilation."""
    log = (WORK / "warm_up.txt").open("w")
    command = [sys.executable, "-m", "bench.gpu.benchmark", "--warm"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


# Tools of the CUDA toolkit


def under_tool(command: list[str], *arguments: str, log: Path, seconds: float) -> str:
    """Run the small calls under a tool within a number of seconds, and return the output."""
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation per tensor, so the tool sees where each ends
    command = [*command, sys.executable, "-m", "bench.gpu.small_calls", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
    return log.read_text(errors="replace")


def sanitizer(part: Part) -> int:
    """Check the kernels of every op for accesses out of bounds, then for races."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        part.add(summary="compute-sanitizer is not installed")
        return NOT_AVAILABLE
    states = []
    for name, share in (("memcheck", 0.6), ("racecheck", 1.0)):
        log = WORK / f"{name}.txt"
        text = under_tool([tool, "--tool", name, "--report-api-errors", "no"], log=log, seconds=share * seconds_left())
        done = re.findall(r"^done: (.+)$", text, re.MULTILINE)
        found = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", text)
        if re.search(r"not supported|Unable to find injection|LibraryNotLoaded", text):
            states.append("not available")
        elif found is None:
            states.append("cut" if done else "failed")
        else:
            states.append("passed" if found.group(1) == "0" and "Traceback" not in text else "failed")
        part.add(**{name: f"{states[-1]}; {found.group(0) if found else 'no summary'}; calls: {', '.join(done)}"})
    part.add(summary=", ".join(f"{n} {s}" for n, s in zip(("memcheck", "racecheck"), states, strict=True)))
    order = {"failed": FAILED, "cut": CUT, "not available": NOT_AVAILABLE}
    return next((order[state] for state in order if state in states), PASSED)


METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}


def profile(part: Part) -> int:
    """Profile the forward and the backward kernel of a large divergence, without changing the GPU's clocks."""
    tool = find_tool("ncu")
    if tool is None:
        part.add(summary="ncu is not installed")
        return NOT_AVAILABLE
    command = [tool, "--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:kdkernels"]
    command += ["--launch-count", "4", "--page", "raw", "--csv", "--metrics", ",".join(METRICS)]
    log = WORK / "ncu.txt"
    text = under_tool(command, "--large", log=log, seconds=seconds_left(reserve=3.0))
    rows = [line for line in text.splitlines() if line.startswith('"')]
    if len(rows) < 3:
        part.add(summary="not available: ncu measured nothing", output=text[-1000:])
        return NOT_AVAILABLE
    part.add(kernels=rows, summary=f"{len(rows) - 2} kernels measured")
    return PASSED


def main() -> int:
    steps = {f.__name__: f for f in (environment, build, correctness, sanitizer, profile)}
    return steps[sys.argv[1]](Part(Path(os.environ["KDKERNELS_PART"])))


if __name__ == "__main__":
    sys.exit(main())
