"""Count the instructions of the CPU kernels: a number without noise, on any machine and beside any other work.

    python -m bench.instructions.count [--write]

Compiles the AVX2 kernels and bench/instructions/driver.cpp with g++, counts the cases in csrc/<op>/counted.h with
callgrind, and compares them with the budgets in bench/budgets/instructions.json; --write updates the budgets. Exit
status: 0 within the budgets, 1 over them, 3 if nothing can be counted. Needs g++, valgrind, and an x86-64 processor
with AVX2 (valgrind does not support AVX-512). Instructions are not time: they show that code has changed, and a
benchmark shows what that is worth.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from setup import list_headers

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "bench/budgets/instructions.json"
KERNELS = ROOT / "csrc/isa/avx2.cpp"
DRIVER = ROOT / "bench/instructions/driver.cpp"
COMPILER = "g++"
# The flags of setup.py; torch adds the standard.
FLAGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fno-math-errno", "-g0"]
STANDARD = "-std=c++20"
# The flags that CPython adds on most systems, fixed here so that the counts are the same with every Python.
PYTHON_FLAGS = ["-DNDEBUG", "-fwrapv", "-fPIC"]
MARGIN = 0.03
MARGIN_OF_ANOTHER_COMPILER = 0.15  # another major version of the compiler chooses other instructions for the same code
NOT_HERE = 3


@dataclass(frozen=True)
class Count:
    """The number of instructions of one case, and of elements in its input."""

    instructions: int
    elements: int


def why_not_here() -> str | None:
    """Return why instructions cannot be counted on this machine, or None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"instructions are counted on x86-64 Linux only; this is {sys.platform} on {platform.machine()}"
    if "avx2" not in Path("/proc/cpuinfo").read_text().split():
        return "this processor has no AVX2"
    missing = [name for name in (COMPILER, "valgrind") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: no instructions are counted" if missing else None


def compiler_version() -> str:
    """Return the version of the compiler, such as 12.2.0."""
    command = [COMPILER, "-dumpfullversion"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(*command: str | Path) -> str:
    """Run a command and return its output; if it fails, the output is part of the exception."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with status {result.returncode}:\n{result.stderr}")
    return result.stdout


def build(folder: Path) -> Path:
    """Compile the kernels and the driver into a folder and return the program."""
    for name in ("cpu_kernels.h", "counted.h"):
        list_headers(folder, name)
    flags = [*PYTHON_FLAGS, *FLAGS, STANDARD, f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    objects = [folder / "kernels.o", folder / "driver.o"]
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda files: run(COMPILER, *flags, "-c", *files),
                [(KERNELS, "-o", objects[0]), (DRIVER, "-o", objects[1])],
            )
        )
    program = folder / "driver"
    # Resolve library functions before anything is counted, not at their first call.
    run(COMPILER, *objects, "-Wl,-z,now", "-o", program)
    return program


def count(program: Path) -> dict[str, Count]:
    """Run the program under callgrind, which writes one file per call of measured(), and return all counts."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "counts"
        options = ["--toggle-collect=measured", "--dump-after=measured", f"--callgrind-out-file={output}"]
        cases = [line.split("\t") for line in run("valgrind", "--tool=callgrind", *options, program).splitlines()]
        result = {}
        for number, (elements, name) in enumerate(cases, start=1):
            text = output.with_suffix(f".{number}").read_text()
            instructions = next(line for line in text.splitlines() if line.startswith("totals:")).split()[1]
            result[name] = Count(int(instructions), int(elements))
        files = len(list(Path(folder).glob("counts.*")))
        if len(result) != files:
            raise RuntimeError(f"{len(result)} cases of different names, but {files} files of counts")
    return result


def margin(recorded: str, version: str) -> float:
    """Return the allowed excess over the budgets, which is larger if another compiler version made them."""
    return MARGIN if recorded.split(".")[0] == version.split(".")[0] else MARGIN_OF_ANOTHER_COMPILER


def complaints(counts: dict[str, Count], budgets: dict[str, Count], allowed: float) -> list[str]:
    """Return a sentence for every case that breaks its budget."""
    result = [f"{name} has a budget, but no longer exists" for name in budgets if name not in counts]
    for name, found in counts.items():
        budget = budgets.get(name)
        if budget is None:
            result.append(f"{name} has no budget in {BUDGETS.relative_to(ROOT)}")
        elif found.elements != budget.elements:
            result.append(f"{name} has {found.elements} elements; its budget is for {budget.elements}")
        elif found.instructions > budget.instructions * (1 + allowed):
            more = found.instructions / budget.instructions - 1
            result.append(
                f"{name} takes {found.instructions} instructions, {more:.1%} more than its budget of "
                f"{budget.instructions}; allowed are {allowed:.0%}"
            )
    return result


def savings(counts: dict[str, Count], budgets: dict[str, Count], allowed: float) -> list[str]:
    """Return a sentence for every case so far below its budget that the budget should be updated."""
    return [
        f"{name} takes {1 - found.instructions / budgets[name].instructions:.1%} fewer instructions than its budget"
        for name, found in counts.items()
        if name in budgets and found.instructions < budgets[name].instructions * (1 - allowed)
    ]


def table(counts: dict[str, Count], budgets: dict[str, Count]) -> str:
    """Return a table with one line per case."""
    width = max(map(len, counts))
    lines = [f"{'case':{width}}  instructions  per element    budget   change"]
    for name, found in counts.items():
        line = f"{name:{width}}  {found.instructions:12}  {found.instructions / found.elements:11.2f}"
        if name in budgets:
            budget = budgets[name].instructions
            line += f"  {budget:8}  {found.instructions / budget - 1:+7.2%}"
        lines.append(line)
    return "\n".join(lines)


def write_budgets(counts: dict[str, Count]) -> None:
    """Write the current counts as the budgets."""
    cases = [f"    {json.dumps(name)}: {json.dumps(asdict(found))}" for name, found in counts.items()]
    head = f'  "compiler": "{COMPILER}",\n  "version": "{compiler_version()}",\n  "cases": '
    BUDGETS.write_text("{\n" + head + "{\n" + ",\n".join(cases) + "\n  }\n}\n")


def read_budgets() -> tuple[str, dict[str, Count]]:
    """Return the compiler version that the budgets were made with, and the budgets."""
    content = json.loads(BUDGETS.read_text())
    return content["version"], {name: Count(**budget) for name, budget in content["cases"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions of the CPU kernels, counted by callgrind.")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGETS.relative_to(ROOT)}")
    options = parser.parse_args()
    reason = why_not_here()
    if reason is not None:
        print(reason, file=sys.stderr)
        sys.exit(NOT_HERE)
    with tempfile.TemporaryDirectory() as folder:
        counts = count(build(Path(folder)))
    if options.write:
        write_budgets(counts)
    recorded, budgets = read_budgets()
    version = compiler_version()
    allowed = margin(recorded, version)
    print(table(counts, budgets))
    if allowed != MARGIN:
        print(f"the budgets were made with {COMPILER} {recorded}, this is {version}: {allowed:.0%} is allowed")
    fewer = savings(counts, budgets, allowed)
    if fewer:
        print("\n".join([*fewer, "update the budgets with --write to keep this"]))
    found = complaints(counts, budgets, allowed)
    print("\n".join(found) or f"{len(counts)} cases within their budgets")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
