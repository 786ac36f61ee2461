"""The planted faults apply to this tree; `make test-all` checks that the core tests catch each."""

import shutil

import pytest

from python_tests.planted import check


@pytest.mark.skipif(shutil.which("git") is None, reason="git, which applies the patches, is not installed")
@pytest.mark.parametrize("fault", check.faults(), ids=lambda fault: fault.patch.stem)
def test_every_patch_applies(fault):
    check.apply(fault.patch, check.ROOT, "--check")
    assert fault.title.endswith(".")
    assert fault.tests
    assert all((check.ROOT / test).is_file() for test in fault.tests)


def test_there_are_at_least_ten():
    assert len(check.faults()) >= 10
