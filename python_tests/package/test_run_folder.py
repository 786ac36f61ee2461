"""The folder of a run: its settings, its lock, and what the disk may do."""

import errno
import json
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch

from kdkernels import _run_folder
from kdkernels._run_folder import describe, require_space, run_folder
from kdkernels.models import SmallCNN

CPU = torch.device("cpu")
SETTINGS = {"seed": 0, "config": {"rounds": 2, "learning_rate": 0.1}, "classes": [1, 2], "mean": None}


def claim(folder, **changes):
    with run_folder(folder, {**SETTINGS, **changes}, device=CPU, may_grow={"config.rounds"}):
        pass


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 3}, "seed was 0 and is 3;"),
        ({"config": {"rounds": 2, "learning_rate": 0.2}}, "config.learning_rate was 0.1 and is 0.2;"),
        ({"config": {"rounds": 1, "learning_rate": 0.1}}, "config.rounds was 2 and is 1;"),
        ({"classes": [1, 2, 3]}, r"classes was \[1, 2\] and is \[1, 2, 3\];"),
        ({"mean": [0.5]}, r"mean was not set and is \[0.5\];"),
        ({"seed": 3, "mean": [0.5]}, r"seed was 0 and is 3; mean was not set and is \[0.5\]; choose another folder"),
    ],
)
def test_what_differs_is_named(tmp_path, changes, text):
    claim(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other settings: " + text):
        claim(tmp_path, **changes)
    assert (tmp_path / "settings.json").read_bytes() == before
    claim(tmp_path)


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path):
    claim(tmp_path, seed=np.int64(7), mean=[np.float32(0.5)])
    claim(tmp_path, seed=torch.tensor(7), mean=[0.5])
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        claim(tmp_path, seed=8, mean=(0.5,))


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\); choose a folder on another disk"):
        claim(tmp_path)


def test_some_settings_may_grow(tmp_path):
    claim(tmp_path)
    claim(tmp_path, config={"rounds": 5, "learning_rate": 0.1})
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["config"]["rounds"] == 5
    with pytest.raises(ValueError, match=r"config\.rounds was 5 and is 2"):
        claim(tmp_path)


def test_what_changes_the_last_bits_is_warned_of(tmp_path):
    claim(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=rf"threads was {threads} and is {threads + 1}"):
            claim(tmp_path)
    finally:
        torch.set_num_threads(threads)
    claim(tmp_path)


@pytest.mark.parametrize("text", ["", '{"settings": {"seed"', "\x00\x01"])
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        claim(tmp_path)


@pytest.mark.parametrize("value", [[], {"inversion": {}, "seed": 3}])
def test_settings_of_another_version_are_named(tmp_path, value):
    (tmp_path / "settings.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"settings\.json is not from this version of kdkernels"):
        claim(tmp_path)


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys, time, torch; from kdkernels._run_folder import locked_folder\n"
        f"with locked_folder({str(tmp_path)!r}): print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"another process \(pid {process.pid}\) is using"):
            claim(tmp_path)
    finally:
        process.kill()  # which cannot clean up behind it
        process.wait()
    process.stdout.close()
    claim(tmp_path)


def test_places_that_are_no_folders_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be used as an output folder \(a file of that name exists\)"):
        claim(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot be used as an output folder \(Not a directory\)"):
        claim(tmp_path / "file" / "below")
    (tmp_path / "unwritable").mkdir()
    (tmp_path / "unwritable" / ".lock").mkdir()
    with pytest.raises(OSError, match=r"unwritable cannot be used as an output folder \(Is a directory\)"):
        claim(tmp_path / "unwritable")


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(_run_folder.shutil, "disk_usage", lambda path: Usage(0, 0, 5 * 2**20))
    require_space(tmp_path, 5 * 2**20)
    (tmp_path / "batch").write_bytes(bytes(2**20))
    require_space(tmp_path, 6 * 2**20)
    with pytest.raises(OSError, match=r"the run needs 6 MiB more in .*, but only 5 MiB are free"):
        require_space(tmp_path, 7 * 2**20)


def test_networks_are_described_by_class_and_values():
    model = SmallCNN(3)
    assert describe(model).startswith("SmallCNN ")
    assert describe(model) == describe(model)
    assert describe(model) != describe(SmallCNN(3))
