"""Rules of the house that a linter does not know."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sorted((ROOT / "kdkernels").rglob("*.py"))
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
SEE_VALUES = {"cases.py", "reference.py"}
OPS = {path.parent.name for path in (ROOT / "kdkernels/ops").glob("*/__init__.py")}


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


def test_every_op_has_its_folders():
    assert OPS
    for op in OPS:
        python, cpp = ROOT / "kdkernels/ops" / op, ROOT / "csrc" / op
        assert {"__init__.py", "reference.py", "triton.py", "cases.py"} <= {path.name for path in python.iterdir()}
        assert {"cpu.cpp", "cpu_kernels.h", "cuda.cpp", "cuda_kernels.cu"} <= {path.name for path in cpp.iterdir()}
        assert (ROOT / f"python_tests/ops/test_{op}.py").is_file()


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT / "kdkernels").parts[0]
    names = list(imports(path))
    if "triton" not in path.name:
        assert not [name for name in names if name.split(".")[0] == "triton"]
    forbidden = ()
    if layer == "ops" and path.name != "cases.py":
        forbidden = ("kdkernels.functional", "kdkernels.nn")
    if layer in {"ops", "functional.py", "nn.py", "testing"}:
        forbidden += tuple(f"kdkernels.{name}" for name in ("inversion", "distillation", "models", "data", "cli"))
    assert not [name for name in names if name.startswith(forbidden)] if forbidden else True


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_rules(path):
    code = code_of(path)
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', code)
    # A file with ATen headers takes 5 to 20 seconds to compile, and its library serves one version of torch.
    assert not [name for name in includes if name.startswith(("ATen", "c10", "torch/extension", "torch/torch"))]
    torch = [name for name in includes if name.startswith("torch/")]
    assert not torch or path.name == "stable.h"
    if path.name == "math.h":
        assert not [name for name in includes if "cuda" in name or "stable" in name]
    if not path.name.startswith("cuda") and "cuda" not in path.parts:
        assert not [name for name in includes if "cuda" in name]
    # Kernel launches go through one typed helper, sums through partial results in a fixed order.
    assert "<<<" not in code
    assert not re.search(r"atomicAdd|std::atomic<(float|double)>", code)
    assert not re.search(r"-ffast-math|-std=|march=native", (ROOT / "setup.py").read_text())


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_do_not_wait_for_a_device(path):
    if (
        path.relative_to(ROOT / "kdkernels").parts[0] in {"ops", "functional.py", "nn.py"}
        and path.name not in SEE_VALUES
    ):
        assert not re.search(r"\.(item|tolist|cpu)\(\)|torch\.equal\(", path.read_text())


def test_files_fit_in_a_head():
    for path in [*PYTHON, *CPP, *(ROOT / "python_tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        lines = len(path.read_text().splitlines())
        # A contract is one file with the documentation of its functions.
        assert lines <= (400 if path.parent.parent.name == "ops" else 350), (
            f"{path.relative_to(ROOT)} has {lines} lines"
        )
