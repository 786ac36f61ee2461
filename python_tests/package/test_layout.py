"""Rules of the house that a linter does not know."""

import ast
import re
from pathlib import Path

import pytest

from kdkernels import functional

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sorted((ROOT / "kdkernels").rglob("*.py"))
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)
TOOLS = [path for folder in ("bench", "python_tests") for path in sorted((ROOT / folder).rglob("*.py"))]
CPP_TOOLS = [
    path
    for folder in ("csrc", "bench", "python_tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES
]
ROUTINES = ("inversion", "distillation", "models", "data", "cli", "compat")
SEE_VALUES = {"_positions.py", "cases.py", "loss_reference.py", "reference.py"}
CPP_OPS = sorted(path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name not in {"core", "isa"})
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
    """An op may start with contract, reference and cases; files that belong together come together."""
    assert OPS
    for op in OPS:
        python, cpp = ROOT / "kdkernels/ops" / op, ROOT / "csrc" / op
        names = {path.name for path in (*python.glob("*"), *cpp.glob("*"))}
        assert {"__init__.py", "reference.py", "cases.py"} <= names, op
        for pair in ({"cpu.cpp", "cpu_kernels.h"}, {"cuda.cpp", "cuda_kernels.cu"}, {"triton_cases.py", "triton.py"}):
            assert len(pair & names) != 1, f"{op} has only one of {pair}"
        assert (ROOT / f"python_tests/ops/test_{op}.py").is_file()
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"core", "isa"} <= OPS


def test_ops_are_found_by_looking():
    """Outside its folders and its own tests nothing imports an op or lists it."""
    for path in [*PYTHON, *TOOLS]:
        relative = path.relative_to(ROOT)
        if relative.as_posix() in {"kdkernels/functional.py", "kdkernels/nn.py"}:
            continue
        own = {op for op in OPS if op in relative.parts or re.search(rf"(test|triton|emulated)_{op}", path.stem)}
        imported = {name.split(".")[2] for name in imports(path) if name.startswith("kdkernels.ops.") and "." in name}
        assert not imported & OPS - own, f"{relative} imports {imported & OPS - own}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
                children = node.keys if isinstance(node, ast.Dict) else node.elts
                listed = {child.value for child in children if isinstance(child, ast.Constant)} & OPS
                # Lists of public functions are none of ops, even if some of them are called alike.
                assert len(listed) < 2 or listed <= set(functional.__all__), f"{relative} lists {listed}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT / "kdkernels").parts[0]
    names = list(imports(path))
    if "triton" not in path.name:
        assert not [name for name in names if name.split(".")[0] == "triton"]
    above = {
        "ops": ("functional", "nn", "testing", *ROUTINES),
        "functional.py": ("nn", "testing", *ROUTINES),
        "nn.py": ("testing", *ROUTINES),
        "testing": ROUTINES,
        "inversion": ("distillation", "cli", "testing"),
        "distillation": ("cli", "testing"),
        "compat": ("cli", "data", "models", "testing"),
    }.get(layer, ())
    assert not [name for name in names for module in above if name.startswith(f"kdkernels.{module}")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_do_not_wait_for_a_device(path):
    in_ops = path.relative_to(ROOT / "kdkernels").parts[0] in {"ops", "functional.py", "nn.py"}
    if in_ops and path.name not in SEE_VALUES:
        assert not re.search(r"\.(item|tolist|cpu)\(\)|torch\.equal\(", path.read_text())


@pytest.mark.parametrize("op", CPP_OPS)
def test_files_of_an_op_are_named_by_role(op):
    names = {path.name for path in (ROOT / "csrc" / op).iterdir()}
    shared, cpu = {"arguments.h", "binding.h"}, {"plan.h", "cpu_kernels.h", "cpu.cpp", "counted.h"}
    cuda = {"cuda_kernels.h", "cuda_kernels.cu", "cuda.cpp"}
    assert shared < names
    assert cpu <= names or not cpu & names
    assert cuda <= names or not cuda & names
    others = names - shared - cpu - cuda - {"math.h"}
    assert not [name for name in others if not name.startswith(("cpu_", "cuda_"))]


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_rules(path):
    code = code_of(path)
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', code)
    # A file with ATen headers takes 5 to 20 seconds to compile, and its library serves one version of torch.
    assert not [name for name in includes if name.startswith(("ATen", "c10", "torch/extension", "torch/torch"))]
    torch = [name for name in includes if name.startswith("torch/")]
    assert not torch or path.name == "stable.h"
    if path.name in {"math.h", "arguments.h", "plan.h"} or "kernels" in path.name:
        assert not [name for name in includes if name.endswith(("stable.h", "dispatch.h", "binding.h"))]
    if not path.name.startswith("cuda") and "cuda" not in path.parts:
        assert not [name for name in includes if "cuda" in name]
    # Kernel launches go through one typed helper, sums through partial results in a fixed order.
    assert "<<<" not in code
    assert not re.search(r"atomicAdd|std::atomic<(float|double)>", code)


def test_builds_pin_no_standard_and_no_processor():
    assert not re.search(r"-ffast-math|-std=|march=native", (ROOT / "setup.py").read_text())


def test_only_an_op_and_its_test_know_its_cpp_files():
    for path in [*CPP_TOOLS, ROOT / "setup.py", ROOT / "CMakeLists.txt"]:
        own = path.parent.name if path.parent.parent.name == "csrc" else ""
        if path.parent == ROOT / "python_tests/ops":
            own = next((op for op in CPP_OPS if path.name.startswith(op)), "")
        code = code_of(path) if path in CPP_TOOLS else path.read_text()
        assert not [op for op in CPP_OPS if op != own and re.search(rf"{op}", code)], path.relative_to(ROOT)


def test_files_fit_in_a_head():
    for path in [*PYTHON, *TOOLS, *CPP_TOOLS]:
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines"
