"""Rules of the house that a linter does not know."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted((ROOT / "kdkernels").rglob("*.py"))
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
OPS = {path.stem for path in (ROOT / "kdkernels/ops").glob("[a-z]*.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_of(path):
    """C++ without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def test_every_op_has_its_file_in_every_layer():
    assert OPS
    for folder, pattern in (
        ("kdkernels/reference", "[a-z]*.py"),
        ("kdkernels/cases", "[a-z]*.py"),
        ("csrc/cpu", "*.cpp"),
    ):
        stems = {path.stem for path in (ROOT / folder).glob(pattern)}
        assert stems == OPS, folder
    for op in OPS:
        assert (ROOT / "python_tests" / f"test_{op}.py").is_file()


def test_gpu_backends_keep_the_stems():
    for folder, pattern in (("csrc/cuda", "*.cu"), ("csrc/cuda", "*.cpp"), ("kdkernels/triton", "[a-z]*.py")):
        assert {path.stem for path in (ROOT / folder).glob(pattern)} - {"module"} == OPS
    assert {path.stem for path in (ROOT / "csrc/math").glob("*.h")} - OPS <= {"value", "accumulate", "fast_exp"}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT / "kdkernels").parts[0]
    names = list(imports(path))
    if layer != "triton":
        assert not [name for name in names if name.split(".")[0] == "triton"]
    forbidden = {
        "reference": ("kdkernels.ops", "kdkernels.functional", "kdkernels.nn"),
        "ops": ("kdkernels.functional", "kdkernels.nn", "kdkernels.cases"),
    }.get(layer, ())
    routines = ("kdkernels.inversion", "kdkernels.distillation", "kdkernels.models", "kdkernels.data", "kdkernels.cli")
    if layer in {"reference", "ops", "triton", "functional.py", "nn.py", "cases", "_backends.py", "_checks.py"}:
        forbidden += routines
    assert not [name for name in names if name.startswith(forbidden)] if forbidden else True


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_rules(path):
    code = code_of(path)
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', code)
    folder = path.relative_to(ROOT / "csrc").parts[0]
    # A file with ATen headers takes 5 to 20 seconds to compile, and its library serves one version of torch.
    assert not [name for name in includes if name.startswith(("ATen", "c10", "torch/extension", "torch/torch"))]
    torch = [name for name in includes if name.startswith("torch/")]
    assert not torch or path.name == "stable.h"
    if folder == "math":
        assert not [name for name in includes if "cuda" in name or "stable" in name]
    if folder != "cuda":
        assert not [name for name in includes if "cuda" in name]
    # Kernel launches go through one typed helper, sums through partial results in a fixed order.
    assert "<<<" not in code
    assert not re.search(r"atomicAdd|std::atomic<(float|double)>", code)
    assert not re.search(r"-ffast-math|-std=|march=native", (ROOT / "setup.py").read_text())


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_do_not_wait_for_a_device(path):
    if path.relative_to(ROOT / "kdkernels").parts[0] in {"ops", "triton", "functional.py", "nn.py"}:
        assert not re.search(r"\.(item|tolist|cpu)\(\)|torch\.equal\(", path.read_text())


def test_files_fit_in_a_head():
    for path in [*PYTHON, *CPP, *(ROOT / "python_tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        lines = len(path.read_text().splitlines())
        # A contract is one file with the documentation of its functions.
        assert lines <= (400 if path.parts[-2] == "ops" else 350), f"{path.relative_to(ROOT)} has {lines} lines"
