"""The instruction counts of the CPU kernels, by callgrind, against bench/budgets/instructions.json."""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
instruction_counts = pytest.importorskip("bench.instructions.count", reason="the tests run without the source tree")
Count = instruction_counts.Count

FOLDERS = sorted(path.parent for path in (ROOT / "csrc").glob("*/counted.h"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The counts of two runs."""
    reason = instruction_counts.why_not_here()
    if reason is not None:
        pytest.skip(reason)
    program = instruction_counts.build(tmp_path_factory.mktemp("instructions"))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(instruction_counts.count, [program, program]))


@pytest.mark.slow
def test_kernels_keep_their_budgets(measured):
    recorded, budgets = instruction_counts.read_budgets()
    allowed = instruction_counts.margin(recorded, instruction_counts.compiler_version())
    assert instruction_counts.complaints(measured[0], budgets, allowed) == []


@pytest.mark.slow
def test_counts_are_repeatable(measured):
    assert measured[0] == measured[1]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_kernel_is_counted(folder):
    binding, plan, counted = ((folder / name).read_text() for name in ("cpu.cpp", "plan.h", "counted.h"))
    ops = set(re.findall(r'm\.impl\("(\w+)\.native"', binding))
    names = re.search(r"without_kernel\[\] = \{(.*?)\}", counted, re.DOTALL)
    without_kernel = set(re.findall(r'"(\w+)"', names.group(1) if names else ""))
    assert without_kernel < ops
    cases = {name.split(":")[0] for name in instruction_counts.read_budgets()[1]}
    assert cases & ops == ops - without_kernel
    kernels = set(re.findall(r"KDKERNELS_KERNEL\(\w+, (\w+), \(const \w+Call&", plan))
    assert kernels
    assert [kernel for kernel in kernels if f"avx2::{kernel}" not in counted] == []


def test_every_op_with_cpu_kernels_is_counted():
    assert sorted(path.parent for path in (ROOT / "csrc").glob("*/cpu_kernels.h")) == FOLDERS
    cases = instruction_counts.read_budgets()[1]
    for words in (("forward_kl", "fp32"), ("js", "bf16"), ("labels", "bf16"), ("dim 1",), ("channels_last", "bf16")):
        assert any(all(word in name for word in words) for name in cases), words


def test_kernels_are_compiled_as_setup_compiles_them(tmp_path):
    """Builds with a fake compiler that only records its arguments; all files are compiled with the same flags."""
    compiler, notes = tmp_path / "g++", tmp_path / "notes"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\nexit 1\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, "KDKERNELS_BUILD": "cpu", "CXX": str(compiler), "TORCH_DONT_CHECK_COMPILER_ABI": "1"},
        capture_output=True,
        check=False,
    )
    asked = next(line for line in notes.read_text().splitlines() if ".cpp" in line).split()
    of_python = f"{sysconfig.get_config_var('CFLAGS')} {sysconfig.get_config_var('CCSHARED')}".split()
    flags = [word for word in asked if re.match(r"-[Ofgmsw]|-std|-W", word)]
    for word in of_python:
        if word in flags:
            flags.remove(word)
    assert flags == [*instruction_counts.FLAGS, instruction_counts.STANDARD]


def test_the_check_can_fail():
    budgets = {"kept": Count(1000, 10), "slow": Count(1000, 10), "lost": Count(1, 1), "other": Count(1000, 10)}
    counts = {"kept": Count(1030, 10), "slow": Count(2000, 10), "new": Count(1, 1), "other": Count(1000, 20)}
    found = instruction_counts.complaints(counts, budgets, instruction_counts.MARGIN)
    assert found == [
        "lost has a budget, but no longer exists",
        "slow takes 2000 instructions, 100.0% more than its budget of 1000; allowed are 3%",
        "new has no budget in bench/budgets/instructions.json",
        "other has 20 elements; its budget is for 10",
    ]
    assert instruction_counts.complaints({"kept": Count(1031, 10)}, {"kept": Count(1000, 10)}, 0.03)
    assert not instruction_counts.complaints({"kept": Count(1149, 10)}, {"kept": Count(1000, 10)}, 0.15)


def test_savings_are_reported_but_do_not_fail():
    budgets, counts = {"fast": Count(1000, 10)}, {"fast": Count(900, 10), "new": Count(1, 1)}
    assert instruction_counts.savings(counts, budgets, 0.03) == ["fast takes 10.0% fewer instructions than its budget"]
    assert instruction_counts.savings({"fast": Count(970, 10)}, budgets, 0.03) == []


def test_another_compiler_has_a_wider_margin():
    assert instruction_counts.margin("12.2.0", "12.4.1") == 0.03
    assert instruction_counts.margin("12.2.0", "13.1.0") == 0.15


def test_missing_tools_have_a_separate_status(tmp_path):
    command = [sys.executable, "-m", "bench.instructions.count"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == instruction_counts.NOT_HERE
    assert len(result.stderr.splitlines()) == 1
