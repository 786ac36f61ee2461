"""Weights and checkpoints that are written, and read back."""

import copy
import doctest
import random

import numpy as np
import pytest
import torch
from networks import Tied
from safetensors.torch import load_file, save_model
from torch import nn

from kdkernels import checkpoints
from kdkernels._files import atomic_file, read_json, write_json
from kdkernels.checkpoints import fingerprint, load_checkpoint, load_weights, save_checkpoint, save_weights
from kdkernels.models import SmallCNN


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_tied_weights_are_written_under_each_name(tmp_path):
    trained = Tied()
    save_weights(trained, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == trained.state_dict().keys()
    model = Tied()
    load_weights(model, tmp_path / "x.safetensors")
    assert_same(model, trained)
    assert model.inner.weight is model.outer.weight
    save_model(trained, tmp_path / "y.safetensors")  # leaves out one of the names
    assert len(load_file(tmp_path / "y.safetensors")) == len(trained.state_dict()) - 1
    model = Tied()
    load_weights(model, tmp_path / "y.safetensors")
    assert_same(model, trained)


def test_untied_weights_do_not_fit_a_tied_network(tmp_path):
    state = dict(Tied().state_dict())
    state["outer.weight"] = state["inner.weight"] + 1
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"different values for inner\.weight and outer\.weight"):
        load_weights(Tied(), tmp_path / "x.pt")


def test_views_and_permuted_weights_are_written(tmp_path):
    model = nn.Linear(3, 4)
    whole = torch.randn(2, 3, 4)
    model.weight = nn.Parameter(whole[1].t())
    model.register_buffer("other", whole[0])
    save_weights(model, tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    assert torch.equal(state["weight"], whole[1].t())
    assert torch.equal(state["other"], whole[0])


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def test_a_state_that_is_not_a_tensor(tmp_path):
    trained, model = WithExtraState(2, 2), WithExtraState(2, 2)
    with pytest.raises(ValueError, match="not a tensor in _extra_state"):
        save_weights(trained, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    torch.save(trained.state_dict(), tmp_path / "x.pt")
    load_weights(model, tmp_path / "x.pt")
    assert model.steps == 3
    assert torch.equal(model.weight, trained.weight)


def test_a_state_that_is_not_dense(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="keeps sparse or quantized tensors in adjacency"):
        save_weights(model, tmp_path / "x.safetensors")


# Files of interrupted runs


def test_a_checkpoint_restores_every_generator(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn()

    np.random.randn()  # leaves half of a pair
    save_checkpoint(tmp_path / "x" / "run.pt", {"epoch": 3, "weights": torch.arange(3)})
    expected = draw()
    draw()
    state = load_checkpoint(tmp_path / "x" / "run.pt")
    assert draw() == expected
    assert state.keys() == {"epoch", "weights"}
    assert torch.equal(state["weights"], torch.arange(3))
    assert load_checkpoint(tmp_path / "other.pt") is None
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.pt"]


def test_damaged_checkpoints_are_explained(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"epoch": 3})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"run\.pt' is damaged.*; remove it to start again"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"run\.pt' is not a checkpoint of an interrupted run"):
        load_checkpoint(path)


def test_an_unfinished_file_leaves_the_previous_one(tmp_path):
    write_json(tmp_path / "x.json", [1])

    def stop():
        with atomic_file(tmp_path / "x.json") as file:
            file.write(b"[2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert read_json(tmp_path / "x.json", "") == [1]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", [float("nan")])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_files_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/x\.json could not be written \(File exists\)"):
        write_json(tmp_path / "file" / "x.json", [1])
    (tmp_path / "x.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"x\.json could not be written \(No space left on device\)"):
        write_json(tmp_path / "x.json", [1])


def test_fingerprints_tell_networks_apart():
    model = SmallCNN(3)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).eval())
    changed = copy.deepcopy(model)
    changed[1].running_mean[0] += 1e-7
    assert fingerprint(changed) != fingerprint(model)
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.Sequential(nn.GELU()))
    assert fingerprint(nn.Linear(2, 2).bfloat16())
    assert fingerprint(WithExtraState(2, 2))


@pytest.mark.parametrize("function", [load_weights, save_weights], ids=lambda function: function.__name__)
def test_example(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={"torch": torch, **vars(checkpoints)})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
