"""The build switch, build errors, and packages built from the source distribution."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not available")


def build(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_switch():
    result = build("build_ext", "--dry-run", KDKERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "KDKERNELS_BUILD is 'gpu'; accepted are auto, cpu, cuda, none" in result.stderr


def test_a_missing_compiler_is_an_error_with_a_remedy():
    result = build("build_ext", KDKERNELS_BUILD="auto", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' was not found" in result.stderr
    assert "KDKERNELS_BUILD=none" in result.stderr


@pytest.fixture
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("command", "programs"),
    [
        ("g++", ["g++"]),
        ("ccache g++", ["ccache", "g++"]),
        ("/usr/bin/g++ -m64", ["/usr/bin/g++"]),
        ("ccache g++ -m64 -B/usr/bin", ["ccache", "g++"]),
        ("env CCACHE_DIR=/tmp ccache g++", ["env", "ccache", "g++"]),
        ("'/my tools/sccache' '/my tools/g++'", ["/my tools/sccache", "/my tools/g++"]),
        ("ccache", ["ccache"]),  # under the name of the compiler, as Debian installs it
        ("", [""]),
    ],
)
def test_a_compiler_may_have_a_launcher_and_options(setup_py, command, programs):
    assert setup_py.programs_of(command) == programs


def test_a_command_of_several_words_becomes_a_program(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"env {sys.executable} -c 'import sys; print(sys.argv[1:])' -m64")
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.delenv("TORCH_NO_COMPILER_WRAPPER", raising=False)
    for variable in ("CC", "CXX"):
        setup_py.as_one_program(variable, tmp_path)
    assert os.environ["CC"] == "gcc"
    assert os.environ["TORCH_NO_COMPILER_WRAPPER"] == "1"
    assert Path(os.environ["CXX"]).name == Path(sys.executable).name
    result = subprocess.run([os.environ["CXX"], "a b.cpp"], capture_output=True, text=True, check=True)
    assert result.stdout == "['-m64', 'a b.cpp']\n"


@pytest.mark.slow
def test_a_launcher_and_options_build_the_kernels(tmp_path):
    """Every file is compiled through the launcher, here a script that notes its calls."""
    calls, launcher, tree = tmp_path / "calls", tmp_path / "ccache", tmp_path / "tree"
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {calls}\nexec "$@"\n')
    launcher.chmod(0o755)
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", ".*_cache"))
    compilers = {"CXX": f"{launcher} g++ -m64", "CC": f"{launcher} gcc"}
    result = build("-q", "build_ext", "--inplace", cwd=tree, KDKERNELS_BUILD="cpu", **compilers)
    assert result.returncode == 0, result.stderr
    assert list((tree / "kdkernels").glob("_C*"))
    assert calls.read_text().split().count("g++") >= 8


def test_the_message_names_the_program_that_is_missing():
    result = build("build_ext", KDKERNELS_BUILD="auto", CXX="env no-such-compiler -m64")
    assert result.returncode != 0
    assert "'no-such-compiler' was not found (CXX is 'env no-such-compiler -m64')" in result.stderr


def test_cuda_says_what_is_missing(tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    (tmp_path / "nvcc").chmod(0o755)
    result = build("build_ext", KDKERNELS_BUILD="cuda", CUDA_HOME="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode != 0
    assert "KDKERNELS_BUILD=cuda, but nvcc is 1.0" in result.stderr


@pytest.fixture
def clone_and_site(tmp_path):
    """A clone in which nothing was built, and a folder of installed packages."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    shutil.copytree(ROOT / "kdkernels", clone / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "kdkernels").mkdir(parents=True)
    return clone, site


def import_warnings(clone, site, **environment):
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
        "import kdkernels; print(kdkernels.build_info()['missing']['_C'])"
    )
    environment = {"KDKERNELS_BUILD": "auto", "PYTHONPATH": str(site), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout, result.stderr


def test_a_clone_that_hides_the_installed_kernels_says_so(clone_and_site):
    clone, site = clone_and_site
    (site / "kdkernels" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    reason, warned = import_warnings(clone, site)
    assert f"{clone} has no CPU kernels, and hides the installed copy in {site}" in reason
    assert "RuntimeWarning: kdkernels: " + reason.strip() in warned
    assert "start Python in another folder, or run `pip install -e .` here" in warned


def test_no_false_alarm_without_kernels(clone_and_site):
    """Nothing was built anywhere, or nothing was wanted."""
    clone, site = clone_and_site
    reason, warned = import_warnings(clone, site)
    assert "were not built" in reason
    assert warned == ""
    (site / "kdkernels" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    assert import_warnings(clone, site, KDKERNELS_BUILD="none")[1] == ""


@pytest.mark.skipif(os.environ.get("KDKERNELS_BUILD") == "none", reason="this tree was built without kernels")
def test_no_false_alarm_in_place(clone_and_site):
    _, site = clone_and_site
    (site / "kdkernels" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    code = "import kdkernels; print(kdkernels.build_info()['compiled'].keys())"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(site)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "_C" in result.stdout


def install(source: Path, target: Path, mode: str) -> dict[str, str]:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, "KDKERNELS_BUILD": mode},
        check=True,
        cwd=target.parent,
    )
    return {**os.environ, "PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """The source distribution, made from a copy of the tree so that nothing else can be found."""
    copy = tmp_path_factory.mktemp("tree") / "kdkernels"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    result = build("-q", "sdist", cwd=copy, KDKERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


CHECK = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]  # not the tree's own build
import torch, kdkernels, kdkernels.functional as F
assert kdkernels.__file__.startswith(sys.argv[1]), kdkernels.__file__
loss = F.distillation_loss(torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.arange(4))
loss.backward()
print({op: backend for op, (backend, _) in kdkernels.build_info()["backends"]["cpu"].items()}["softmax_divergence"])
"""


def backend_in(site, environment):
    command = [sys.executable, "-c", CHECK, str(site.parent)]
    result = subprocess.run(command, env=environment, cwd=site.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("build", "backend"), [("none", "reference"), ("cpu", "native")])
def test_the_source_distribution_installs(source_distribution, tmp_path, build, backend):
    """It installs with kernels, and without a compiler."""
    site = tmp_path / "site"
    environment = install(source_distribution, site, build)
    assert backend_in(site, environment) == backend
    assert bool(list(site.rglob("*.so"))) == (build == "cpu")


@pytest.mark.slow
def test_isolated_build(source_distribution, tmp_path):
    """A plain pip install creates its own build environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", source_distribution],
        env={**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")},
        check=True,
        cwd=tmp_path,
    )
    site = tmp_path / "site"
    assert backend_in(site, {**os.environ, "PYTHONPATH": str(site)}) == "native"
