"""Shows that the core tests catch deliberate faults: python -m python_tests.planted.check [NAME ...]

Each patch in this folder plants one fault. Its first line says what is wrong, its second names core tests that should
notice. The patches are applied one at a time to a copy of the tree, and those tests run as in `make test`.
They must pass without a patch and fail with each one. CPU kernels are recompiled if a patch touches them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TREE = ROOT / "build" / "planted"
FOLDERS = ("bench", "csrc", "docs", "kdkernels", "python_tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile", "CMakeLists.txt")
LEFT_OUT = {"__pycache__", ".hypothesis"}


@dataclass(frozen=True)
class Fault:
    """A patch, what it breaks, and the tests that should notice."""

    patch: Path
    title: str
    tests: tuple[str, ...]

    @property
    def touches_cpu_kernels(self) -> bool:
        files = [line.split("/", 1)[1] for line in self.patch.read_text().splitlines() if line.startswith("+++ ")]
        return any(file.startswith("csrc/") and "cuda" not in file for file in files)


def faults() -> list[Fault]:
    found = []
    for patch in sorted(HERE.glob("*.patch")):
        title, tests, *_ = patch.read_text().splitlines()
        found.append(Fault(patch, title, tuple(tests.removeprefix("Tests: ").split())))
    return found


def apply(patch: Path, tree: Path, *options: str) -> None:
    """Apply a patch to a tree, or raise."""
    # The tree is inside a repository but is not one: git must not look in the folders above it.
    command = ["git", "apply", *options, str(patch)]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)})


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a source tree by their relative path, compiled libraries included."""
    found = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    found += [folder / name for name in FILES if (folder / name).is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found if not LEFT_OUT & set(path.parts)}


def copy_of_the_tree() -> None:
    """Make TREE equal to the sources. Files that differ get a new modification time, so that they are recompiled."""
    sources, copies = files_of(ROOT), files_of(TREE)
    for name in copies.keys() - sources.keys():
        copies[name].unlink()
    for name, source in sources.items():
        copy = TREE / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)


def compile_kernels() -> None:
    result = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    if result.returncode:
        sys.exit(f"the build failed:\n{result.stderr[-4000:]}")


def run_tests(tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-n", "2"]
    return run(sys.executable, "-m", "pytest", *options, *tests)


def check(fault: Fault) -> str | None:
    """Return why a fault is not caught, or None if it is."""
    copy_of_the_tree()
    apply(fault.patch, TREE)
    if fault.touches_cpu_kernels:
        compile_kernels()
    result = run_tests(fault.tests)
    if result.returncode and re.search(r"^\d+ failed", result.stdout, re.MULTILINE):
        return None
    return f"not caught (status {result.returncode}):\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that the core tests catch each planted fault.")
    parser.add_argument("names", nargs="*", help="names of patches; default: all")
    options = parser.parse_args()
    chosen = [fault for fault in faults() if not options.names or fault.patch.stem in options.names]
    copy_of_the_tree()
    every_test = sorted({test for fault in chosen for test in fault.tests})
    result = run_tests(tuple(every_test))
    if result.returncode:
        print(f"the tests do not pass without a fault:\n{result.stdout[-4000:]}{result.stderr[-2000:]}")
        return 1
    missed = 0
    # Faults in Python first: they run with the library as it is.
    for fault in sorted(chosen, key=lambda fault: fault.touches_cpu_kernels):
        reason = check(fault)
        missed += reason is not None
        print(f"{fault.patch.stem}: {fault.title}: {reason or 'caught'}", flush=True)
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
