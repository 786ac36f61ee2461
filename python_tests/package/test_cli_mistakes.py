"""Mistakes at the command line: a line each, before any image, and nothing left behind."""

import errno
import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdkernels import cli
from kdkernels.inversion import DeepInversion
from kdkernels.models import SmallCNN

SHORT = ["--image-shape", "1", "8", "8", "--preset", "digits", "--iterations", "4", "--batch-size", "20"]
NETWORKS = """
import torch
from torch import nn
from kdkernels.models import SmallCNN

network = SmallCNN(4)

def probabilities():
    return nn.Sequential(SmallCNN(4), nn.Softmax(1))

def a_class():
    return SmallCNN

def needs_width(width):
    return SmallCNN(width)

def in_double():
    return SmallCNN(3).double()

class Overflows(SmallCNN):
    def forward(self, x):
        return super().forward(x) + torch.where(x.abs().amax() > 4.5, float("nan"), 0.0)

class Asserting(SmallCNN):
    def forward(self, x):
        assert x.shape[-1] == 32, "32 pixels"
        return super().forward(x)

class WithoutParameters(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Softplus())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a trained network and some others."""
    torch.manual_seed(0)
    save_file(SmallCNN(4).state_dict(), tmp_path / "teacher.safetensors")
    broken = SmallCNN(4).state_dict()
    broken["4.running_var"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    torch.save(SmallCNN(4), tmp_path / "whole.pt")
    (tmp_path / "file").touch()
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return tmp_path


def command(name, changes):
    """Return a command whose options are changed; None leaves one out."""
    options = {
        "--model": "kdkernels.models:SmallCNN", "--model-args": '{"width": 4}',
        "--checkpoint": "teacher.safetensors", "--output": "out",
    }  # fmt: skip
    if name == "distill":
        options |= {"--student-model": "kdkernels.models:SmallCNN", "--student-model-args": '{"width": 3}'}
        options |= {"--rounds": "1", "--batches": "1", "--epochs": "1"}
    options |= changes
    flags = [option for option, value in options.items() if value == ""]
    pairs = [part for option, value in options.items() if value for part in (option, value)]
    return [name, *SHORT, *pairs, *flags]


OWN = {"--checkpoint": None, "--model-args": None}


@pytest.mark.parametrize("name", ["invert", "distill"])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        # The network
        ({"--model": "kdkernels.models:Nothing"}, "has no callable 'Nothing'"),
        (
            {"--model": "no_such_package:Model"},
            "module 'no_such_package' is neither installed nor in the current folder",
        ),
        ({"--model": "resnet5000"}, "Name a model of your own as package.module:callable"),
        ({"--model": ":x"}, "model ':x' is not package.module:callable"),
        ({"--model": "resnet18", "--checkpoint": None}, "resnet18 would have random weights; give its trained ones by"),
        ({"--pretrained": ""}, "a checkpoint and the published weights were both given"),
        ({"--pretrained": "", "--checkpoint": None}, "--pretrained is for torchvision and timm models"),
        ({"--model-args": "width=4"}, "model arguments must be a JSON object"),
        ({"--model-args": "[4]"}, "model arguments must be a JSON object"),
        ({"--model-args": '{"widht": 4}'}, "got an unexpected keyword argument 'widht'"),
        ({"--model-args": '{"width": "x"}'}, "cannot be built with the model arguments"),
        ({"--model": "my_networks:needs_width", **OWN}, "missing 1 required positional argument: 'width'"),
        ({"--model": "my_networks:a_class", **OWN}, "returned the class SmallCNN"),
        ({"--model": "my_networks:probabilities", **OWN}, "teacher returns probabilities"),
        ({"--model": "my_networks:WithoutParameters", **OWN}, "has no BatchNorm layer"),
        # Its weights
        (
            {"--model-args": '{"width": 5}'},
            "does not match SmallCNN: different shape: 0.weight [4, 1, 3, 3] instead of",
        ),
        ({"--checkpoint": "missing.pt"}, "checkpoint 'missing.pt' does not exist"),
        ({"--checkpoint": "file"}, "checkpoint 'file' is empty"),
        ({"--checkpoint": "."}, "checkpoint '.' is a folder"),
        ({"--checkpoint": "whole.pt"}, "where it was made, save the weights alone with torch.save(model.state_dict()"),
        ({"--checkpoint": "nan.pt"}, "holds values that are not finite in 4.running_var"),
        # The synthesis
        ({"--mean": "0.5"}, "give both --mean and --std"),
        ({"--mean": "0.5", "--std": "0"}, "std is (0.0,); expected positive, finite numbers"),
        ({"--mean": "0.5", "--std": "-1"}, "std is (-1.0,); expected positive, finite numbers"),
        ({"--mean": "nan", "--std": "1"}, "mean is (nan,); expected finite numbers"),
        ({"--preset": "nvlabs-imagenet-1"}, "1 channels; give --mean and --std with one value per channel"),
        ({"--preset": "datafree-deepinv"}, "in the range of real pixels; give --mean and --std"),
        ({"--model": "my_networks:Asserting", **OWN}, "teacher does not accept images of shape [1, 8, 8]: 32 pixels"),
        # The machine
        ({"--device": "tpu"}, "--device is 'tpu', which cannot be used (no such kind of device)"),
        ({"--device": "cuda:7"}, "--device is 'cuda:7', which cannot be used"),
        ({"--device": "meta"}, "--device is 'meta', which cannot be used"),
        ({"--output": "file"}, "file cannot be used as an output folder (a file of that name exists)"),
        ({"--output": "file/below"}, "file/below cannot be used as an output folder"),
    ],
)
def test_mistakes_are_explained(folder, monkeypatch, capsys, name, changes, text):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    assert cli.main(command(name, changes)) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith(f"kdkernels {name}: ")
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


def never(*_, **__):
    raise AssertionError("the synthesis began")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--student-model": "resnet5000"}, "Name a model of your own"),
        ({"--student-model-args": '{"num_classes": 7}'}, "the student returns 7 classes, but the teacher returns 10"),
        ({"--student-model-args": '{"in_channels": 3}'}, "student does not accept images of shape [1, 8, 8]"),
        ({"--student-checkpoint": "teacher.safetensors"}, "does not match SmallCNN"),
        (
            {"--student-checkpoint": "nan.pt", "--student-model-args": '{"width": 4}'},
            "student holds values that are not",
        ),
        ({"--student-pretrained": ""}, "--pretrained is for torchvision and timm models"),
        ({"--temperature": "-1"}, "temperature is -1.0; expected a positive number"),
        ({"--learning-rate": "0"}, "learning_rate is 0.0; expected a positive number"),
    ],
)
def test_mistakes_about_the_student_are_explained(folder, monkeypatch, capsys, changes, text):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    assert cli.main(command("distill", changes)) == 2
    assert text in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["11"], "--classes includes [11]; the network has the classes 0 to 9"),
        (["-1"], "--classes includes [-1]"),
        (["3", "3"], "--classes is [3, 3]; expected each class once"),
    ],
)
def test_mistakes_about_classes_are_explained(folder, capsys, classes, text):
    assert cli.main([*command("invert", {}), "--classes", *classes]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--image-shape", "0", "8", "8"], ["--batches", "0"]])
def test_numbers_out_of_range_are_explained(folder, capsys, option):
    with pytest.raises(SystemExit):
        cli.main([*command("invert", {}), *option])
    assert f"error: argument {option[0]}" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_one_line(folder, capsys):
    arguments = [*command("invert", {"--model": "my_networks:Overflows", **OWN}), "--iterations", "300"]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("kdkernels invert: ")
    assert "the term 'cross_entropy' of the loss is nan in iteration" in err
    assert {path.name for path in (folder / "out").iterdir()} == {".lock", "settings.json"}


def test_missing_safetensors_is_found_first(folder, monkeypatch, capsys):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for name in ("invert", "distill"):
        assert cli.main(command(name, {})) == 2
        assert "safetensors is not installed; run `pip install safetensors`" in capsys.readouterr().err


def test_missing_pictures_cost_the_pictures_alone(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(command("distill", {})) == 0
    assert "Some pictures will be left out" in capsys.readouterr().err
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"student.safetensors", "history.json", "batch_00000.safetensors"} <= names
    assert not [name for name in names if name.endswith(".png")]


def test_a_full_disk_is_one_line(folder, monkeypatch, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "batch_00000.safetensors.partial").symlink_to("/dev/full")
    assert cli.main(command("invert", {})) == 2
    assert "out/batch_00000.safetensors could not be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EIO, "Input/output error", "x"), "[Errno 5] Input/output error: 'x'"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory. Choose a smaller --batch-size."),
        (ImportError("no module"), "no module"),
    ],
)
def test_what_a_user_can_run_into_is_one_line(folder, monkeypatch, capsys, error, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(DeepInversion, "synthesize", fail)
    assert cli.main(command("invert", {})) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"kdkernels invert: {text}"


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, RuntimeError])
def test_faults_of_the_program_keep_their_traceback(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error("a fault")

    monkeypatch.setattr(DeepInversion, "synthesize", fail)
    with pytest.raises(error, match="a fault"):
        cli.main(command("invert", {}))


# What is accepted


def test_a_student_of_another_dtype(folder):
    changes = {"--student-model": "my_networks:in_double", "--student-model-args": None}
    assert cli.main(command("distill", changes)) == 0
    assert load_file(folder / "out" / "student.safetensors")["0.weight"].dtype == torch.float64


def test_a_network_that_a_module_holds(folder, capsys):
    assert cli.main(command("invert", {"--model": "my_networks:network", **OWN})) == 0
    assert "using the weights with which my_networks:network returns the network" in capsys.readouterr().out


def test_torch_checkpoints_and_prefixes_are_accepted(folder):
    state = {f"module.{key}": value for key, value in SmallCNN(4).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, "teacher.pt")
    assert cli.main(command("invert", {"--checkpoint": "teacher.pt"})) == 0


def library(name, error=None):
    """A package like torchvision or timm with one model, "tiny"."""

    def build(model, *, weights=None, pretrained=False, **keywords):
        if weights == "DEFAULT" or pretrained:
            if error is not None:
                raise error
            torch.manual_seed(7)  # the published weights
        return SmallCNN(4, **keywords)

    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name, origin="here")
    if name == "timm":
        module.is_model, module.create_model = "tiny".__eq__, build
    else:
        module.models = types.SimpleNamespace(list_models=lambda: ["tiny"], get_model=build)
    return module


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_published_weights(folder, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, library(name))
    tiny = {"--model": "tiny", **OWN}
    assert cli.main(command("invert", tiny)) == 2
    assert "tiny would have random weights" in capsys.readouterr().err
    parts = command("invert", tiny)
    assert cli.main([*parts, "--pretrained"]) == 0
    torch.manual_seed(7)
    expected = SmallCNN(4)
    save_file(expected.state_dict(), "published.safetensors")
    assert cli.main(command("invert", tiny | {"--checkpoint": "published.safetensors"})) == 0  # the same run
    offline = OSError("<urlopen error [Errno -2] Name or service not known>")
    monkeypatch.setitem(sys.modules, name, library(name, offline))
    assert cli.main([*parts, "--pretrained"]) == 2
    assert "the published weights of tiny could not be downloaded (<urlopen error" in capsys.readouterr().err


def test_settings_hold_all_that_decides_the_result(folder):
    assert cli.main(command("invert", {})) == 0
    settings = json.loads((folder / "out" / "settings.json").read_text())
    names = {"command", "teacher", "image_shape", "seed", "classes", "inversion", "execution"}
    assert settings["settings"].keys() == names
    assert settings["settings"]["classes"] == list(range(10))
    assert settings["notes"].keys() == {"kdkernels", "torch", "threads", "device"}


def test_another_command_in_the_folder_is_refused(folder, capsys):
    assert cli.main(command("invert", {})) == 0
    assert cli.main(command("distill", {})) == 2
    assert "command was 'invert' and is 'distill'" in capsys.readouterr().err
