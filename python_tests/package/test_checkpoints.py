"""Weights as other people save them, and files that cannot be read."""

import argparse
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Tied
from safetensors.torch import save_file
from torch import nn

from kdkernels.checkpoints import load_weights, save_weights
from kdkernels.models import SmallCNN


class OwnModule(nn.Module):
    """A network with an attribute that is called like a wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.randn(2))


class OnlyModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


NESTINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "net": lambda state: {"net": state, "acc": 93.1},
    "model_state": lambda state: {"model_state": state, "epoch": 1, "optimizer": {"state": {0: {"step": 1}}}},
    "any name": lambda state: {"generator_of_2019": {"inner": state}},
    "a tuple": lambda state: (state, 7),
    "module.": lambda state: prefixed("module.", state),
    "_orig_mod.module.": lambda state: prefixed("_orig_mod.module.", state),
    "module._orig_mod.": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "model.": lambda state: {"state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(3)}},
    "any prefix": lambda state: prefixed("backbone.body.", state),
    "student beside teacher": lambda state: {**prefixed("student.", state), "teacher.0.weight": torch.ones(2)},
    "a compiled part": lambda state: {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
    "equal copies": lambda state: {"model": state, "ema": copy.deepcopy(state)},
    "equal copies under wrappers": lambda state: {"model": prefixed("module.", state), "ema": copy.deepcopy(state)},
    "averaged": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(3)},
    "no num_batches_tracked": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "NumPy scalars": lambda state: {"net": state, "best": np.float64(0.9), "n": np.int64(3), "loss": np.ones(4)},
    "options": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, name="x")},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_weights_are_found(tmp_path, nesting, legacy):
    trained, model = SmallCNN(3), SmallCNN(3)
    torch.save(NESTINGS[nesting](trained.state_dict()), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    load_weights(model, tmp_path / "x.pt")
    assert_same(model, trained)


@pytest.mark.parametrize("network", [OwnModule, OnlyModule, Tied, lambda: nn.DataParallel(nn.Linear(2, 2))])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net."])
def test_names_of_the_network_are_no_prefixes(tmp_path, network, prefix):
    trained, model = network(), network()
    torch.save(prefixed(prefix, trained.state_dict()), tmp_path / "x.pt")
    load_weights(model, tmp_path / "x.pt")
    assert_same(model, trained)


def test_a_wrapped_network_takes_plain_weights(tmp_path):
    trained, wrapped = SmallCNN(3), nn.DataParallel(SmallCNN(3))
    torch.save(trained.state_dict(), tmp_path / "x.pt")
    load_weights(wrapped, tmp_path / "x.pt")
    assert_same(wrapped.module, trained)


def test_the_format_is_told_by_the_content(tmp_path):
    trained = SmallCNN(3)
    save_file(trained.state_dict(), tmp_path / "safetensors.pt")
    torch.save(trained.state_dict(), tmp_path / "torch.safetensors")
    for name in ("safetensors.pt", "torch.safetensors"):
        model = SmallCNN(3)
        load_weights(model, tmp_path / name)
        assert_same(model, trained)


def test_weights_with_nan_are_found_once(tmp_path):
    trained, model = SmallCNN(3), SmallCNN(3)
    trained[0].weight.data[0] = float("nan")
    torch.save({"model": trained.state_dict(), "ema": copy.deepcopy(trained.state_dict())}, tmp_path / "x.pt")
    load_weights(model, tmp_path / "x.pt")
    assert torch.equal(model[0].weight.isnan(), trained[0].weight.isnan())


def test_weights_keep_the_dtype_of_the_network(tmp_path):
    trained, model = SmallCNN(3).half(), SmallCNN(3)
    torch.save(trained.state_dict(), tmp_path / "x.pt")
    load_weights(model, tmp_path / "x.pt")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, trained[0].weight.float())


class Harmful:
    """A pickle that would write a file."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


UNREADABLE = {
    "is empty": lambda path: path.write_bytes(b""),
    "is a folder": lambda path: path.mkdir(),
    "does not exist": lambda path: None,
    "cannot be opened": lambda path: path.symlink_to(path),
    "is a git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"),
    "is a web page": lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"),
    "is neither a safetensors nor a torch file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" * 9),
    "was written by pickle": lambda path: path.write_bytes(pickle.dumps({"a": torch.ones(1)})),
    "holds Python objects (torch.nn.modules.linear.Linear)": lambda path: torch.save(nn.Linear(2, 2), path),
    "holds Python objects (getattr)": lambda path: torch.save({"a": Harmful()}, path),
    "another protocol": lambda path: torch.save({"a": [torch.ones(1)]}, path, pickle_protocol=4),
    "is a TorchScript, exported or other archive": lambda path: torch.jit.script(nn.Linear(2, 2)).save(path),
    "holds no state dict": lambda path: torch.save({"epoch": 3}, path),
}


@pytest.mark.parametrize("text", UNREADABLE)
def test_files_that_cannot_be_read_are_explained(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    UNREADABLE[text](path)
    with pytest.raises(ValueError, match=r"x\.pt") as raised:
        load_weights(nn.Linear(2, 2), path)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("kept", [40, 200, 1000, -1])
@pytest.mark.parametrize("written", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_explained(tmp_path, written, kept):
    path = tmp_path / "x.pt"
    if written == "safetensors":
        save_file({"a": torch.ones(500)}, path)
    else:
        torch.save({"a": torch.ones(500)}, path, _use_new_zipfile_serialization=written == "zip")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"checkpoint '.*x\.pt' is damaged"):
        load_weights(nn.Linear(2, 2), path)


@pytest.mark.parametrize("position", [100, 150, 200, 250, 300])
def test_damaged_pickles_are_explained(tmp_path, position):
    path = tmp_path / "x.pt"
    torch.save({"weight": torch.ones(2, 2), "b": [1, "x"]}, path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    data[position : position + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint '.*x\.pt' (is damaged|holds|does not match)"):
        load_weights(nn.Linear(2, 2), path)


def test_what_does_not_fit_is_named(tmp_path):
    state = prefixed("module.", SmallCNN(4).state_dict())
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"does not match SmallCNN in \['state_dict'\].*: different shape: 0.weight"):
        load_weights(SmallCNN(5), tmp_path / "x.pt")
    del state["module.11.bias"]
    torch.save(state | {"module.extra": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"missing: 11\.bias; unexpected: module\.extra; build the network as it was trained"
    ):
        load_weights(SmallCNN(4), tmp_path / "x.pt")


def test_integers_are_no_weights(tmp_path):
    state = {name: value.to(torch.int8) for name, value in SmallCNN(3).state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"different kind of number: 0\.weight torch\.int8 instead of torch\.float32"):
        load_weights(SmallCNN(3), tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_of_another_device_are_read(tmp_path, monkeypatch, legacy):
    trained, model = SmallCNN(3), SmallCNN(3)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save(trained.state_dict(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    load_weights(model, tmp_path / "x.pt")
    assert_same(model, trained)


def test_networks_between_which_a_file_leaves_a_choice_are_refused(tmp_path):
    torch.save({"model": SmallCNN(3).state_dict(), "ema": SmallCNN(3).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"several networks that fit SmallCNN, such as \['model'\] and \['ema'\]"):
        load_weights(SmallCNN(3), tmp_path / "x.pt")


def test_networks_without_values_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="weight of the network has no shape yet"):
        load_weights(nn.LazyLinear(2), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="weight of the network is on the meta device"):
        load_weights(nn.Linear(2, 2, device="meta"), tmp_path / "x.pt")


class SecondVersion(nn.Linear):
    """A layer that takes files that tell no version for old ones, whose weights had another scale."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_layers_with_versions(tmp_path, prefix):
    trained, model = SecondVersion(2, 2), SecondVersion(2, 2)
    torch.save(prefixed(prefix, trained.state_dict()), tmp_path / "x.pt")
    load_weights(model, tmp_path / "x.pt")
    assert_same(model, trained)
    save_weights(trained, tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors")
    assert_same(model, trained)
