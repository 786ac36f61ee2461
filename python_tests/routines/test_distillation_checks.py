"""What is checked before a student is trained, and the forms of a batch."""

import copy

import numpy as np
import pytest
import torch
from distilled import loader_of, setup, train
from torch import nn
from torch.utils.data import DataLoader

from kdkernels.distillation import distill
from kdkernels.functional import distillation_loss
from kdkernels.models import SmallCNN


def _dict_batch(batch):
    return batch["x"], batch["y"]


def _images_alone(batch):
    return batch["x"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a positive"),
        ({"temperature": "4"}, "temperature must be a number"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"kd_weight": float("nan")}, "kd_weight is nan"),
        ({"ce_weight": 0.1}, "ce_weight alone was given"),
        ({"kd_weight": 1.0, "ce_weight": 0.1}, "ce_weight is 0.1, but there are no labels"),
        ({"scheduler_interval": "batch"}, "scheduler_interval is 'batch'; accepted are 'epoch' and 'step'"),
        ({"scheduler": lambda g: None, "scheduler_interval": "step"}, "but no scheduler was given"),
        ({"loader": lambda g: (x for x in g["loader"])}, "loader is a generator, which can be read once"),
        ({"loader": []}, "loader gave no batch in epoch 1"),
        ({"loader": lambda g: iter(list(g["loader"]))}, "loader gave no batch in epoch 2; a generator can be read"),
        ({"loader": [torch.randn(0, 1, 8, 8)]}, "a batch without images"),
        ({"loader": [torch.randn(4, 3, 8, 8)]}, r"a batch of 4 images of shape \[3, 8, 8\] cannot be used"),
        ({"teacher": lambda g: g["student"]}, "student and teacher share the parameters 0.weight"),
        ({"teacher": lambda g: nn.Sequential(*list(g["student"])[:-1], nn.Linear(8, 10))}, "share the parameters"),
        ({"teacher": SmallCNN(4, num_classes=9)}, r"logits of shape \[4, 10\] and teacher of \[4, 9\]"),
        ({"optimizer": lambda g: torch.optim.SGD(g["teacher"].parameters())}, "optimizer holds parameters of the teac"),
        ({"optimizer": lambda g: torch.optim.SGD(SmallCNN(4).parameters())}, "optimizer holds no parameter of the st"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_step(options, text):
    torch.manual_seed(0)
    with pytest.raises((ValueError, TypeError), match=text):
        train(**options)


def test_a_last_batch_of_one_is_found_before_the_first_step():
    """Batch normalization cannot train on one vector; the first batches would be fine."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    teacher, _, options = setup(epochs=1)
    options |= {"optimizer": torch.optim.SGD(student.parameters(), lr=0.1), "scheduler": None}
    before = copy.deepcopy(student.state_dict())
    loader = loader_of(torch.randn(33, 1, 8, 8))
    with pytest.raises(ValueError, match=r"a batch of 1 images of shape .*use drop_last=True or another batch size"):
        distill(student, teacher, loader, **options)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    distill(student, teacher, DataLoader(loader.dataset, batch_size=16, drop_last=True), **options)


def test_the_checks_leave_no_trace():
    """Dropout and batch statistics after one step are those of a loop without checks."""
    x = torch.randn(20, 1, 8, 8)
    teacher = SmallCNN(4).eval()
    students = [nn.Sequential(SmallCNN(3), nn.Dropout(0.5)) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1) for student in students]
    torch.manual_seed(5)
    distill(students[0], teacher, DataLoader(x, 16), epochs=1, optimizer=optimizers[0], progress=False)
    torch.manual_seed(5)
    students[1].train()
    for batch in DataLoader(x, 16):
        optimizers[1].zero_grad()
        distillation_loss(students[1](batch), teacher(batch).detach(), temperature=4.0).backward()
        optimizers[1].step()
    for a, b in zip(students[0].state_dict().values(), students[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Batches of other forms


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": torch.zeros(4, 1, 8, 8)}, r"loader gave a dict with the keys \['image'\]"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4), torch.zeros(4)), "loader gave tuple of Tensor, Tensor, Tensor"),
        ([torch.zeros(4, 1, 8, 8), "names"], "loader gave list of Tensor, str"),
        (np.zeros((4, 1, 8, 8)), "loader gave ndarray"),
    ],
)
def test_batches_that_are_not_understood(batch, text):
    with pytest.raises(TypeError, match=rf"{text}; expected images, .*Pass unpack=lambda batch"):
        train(loader=[batch])


def test_unpack_gives_images_and_labels():
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    expected = train(loader=[(x, y)])
    assert train(loader=[{"x": x, "y": y, "name": ["a"] * 32}], unpack=_dict_batch) == expected
    assert train(loader=[{"x": x}], unpack=_images_alone) == train(loader=[x])
    with pytest.raises(TypeError, match="unpack returned a dict"):
        train(loader=[{"x": x}], unpack=dict)
