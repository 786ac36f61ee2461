"""What is checked before a student is trained, and the forms of a batch."""

import copy

import numpy as np
import pytest
import torch
from distilled import loader_of, setup, train
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from kdkernels.distillation import distill
from kdkernels.functional import distillation_loss
from kdkernels.models import SmallCNN


def _dict_batch(batch):
    return batch["x"], batch["y"]


def _images_alone(batch):
    return batch["x"]


def assigned(network, other):
    """Have a network compute with the very tensors of another; its parameters are objects of their own."""
    network.load_state_dict(other.state_dict(), assign=True)
    return network


def with_batch_norm_of(student):
    """Make a network whose running statistics alone are those of another."""
    network = SmallCNN(4)
    student[1].affine = network[1].affine = False
    student[1].weight = student[1].bias = None
    network[1] = student[1]
    return network


class Asserting(SmallCNN):
    def forward(self, x):
        if x.shape[-1] != 32:
            raise AssertionError
        return super().forward(x)


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
        ({"epochs": 1.5}, "epochs must be an integer, got 1.5"),
        ({"loader": []}, "loader gave no batch in epoch 1"),
        ({"loader": lambda g: iter(list(g["loader"]))}, "loader gave no batch in epoch 2; a generator can be read"),
        ({"loader": [torch.randn(0, 1, 8, 8)]}, "a batch without images"),
        ({"loader": [torch.randn(4, 3, 8, 8)]}, r"a batch of 4 images of shape \[3, 8, 8\] cannot be used"),
        ({"teacher": lambda g: g["student"]}, "student and teacher share the parameters 0.weight"),
        ({"teacher": lambda g: nn.Sequential(*list(g["student"])[:-1], nn.Linear(8, 10))}, "share the parameters"),
        ({"teacher": SmallCNN(4, num_classes=9)}, r"logits of shape \[16, 10\] and teacher of \[16, 9\]"),
        ({"optimizer": lambda g: torch.optim.SGD(g["teacher"].parameters())}, "optimizer holds parameters of the teac"),
        ({"optimizer": lambda g: torch.optim.LBFGS(g["student"].parameters())}, "optimizer is LBFGS, whose step"),
        ({"scheduler": lambda g: [g["scheduler"]]}, "scheduler is a list; expected one of torch.optim.lr_scheduler"),
        ({"scheduler": lambda g: setup()[2]["scheduler"]}, "scheduler is that of another optimizer"),
        ({"loader": [torch.randn(4, 1, 8, 8), torch.randn(0, 1, 8, 8)]}, "a batch without images"),
        ({"loader": [torch.zeros(4, 1, 8, 8, dtype=torch.uint8)]}, r"uint8; convert them .* images.float\(\) / 255"),
        ({"teacher": lambda g: assigned(SmallCNN(4), g["student"])}, "share the parameters 0.weight, 1.weight"),
        ({"teacher": lambda g: with_batch_norm_of(g["student"])}, "share the parameters 1.running_mean"),
        ({"teacher": lambda g: Asserting()}, "a batch of 16 images .* cannot be used for training: AssertionError"),
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
    x = torch.randn(33, 1, 8, 8)
    loader = loader_of(x)
    batches = BatchSampler(range(33), 16, drop_last=False)
    for found in (loader, DataLoader(TensorDataset(x), batch_sampler=batches), list(x.split(16))):
        text = r"a batch of 1 images of shape .*use drop_last=True or another batch size"
        with pytest.raises(ValueError, match=text):
            distill(student, teacher, found, **options)
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


# Loaders and batches of other forms


class Stream(IterableDataset):
    """A data set without a length, given again by every pass or once."""

    def __init__(self, images, once):
        self.images = iter(images) if once else images

    def __iter__(self):
        return iter(self.images)


def test_a_loader_without_a_length(tmp_path):
    """It trains as one with a length does, and notices the end of a stream that can be read once."""
    x = torch.randn(20, 1, 8, 8)
    teacher = SmallCNN(6)
    expected = train(teacher=teacher, loader=DataLoader(x, 16))
    for checkpoint in (None, tmp_path / "student.pt"):
        loader = DataLoader(Stream(x, once=False), 16)
        assert train(teacher=teacher, loader=loader, checkpoint=checkpoint) == expected
    with pytest.raises(ValueError, match="loader gave no batch in epoch 2"):
        train(teacher=teacher, loader=DataLoader(Stream(x, once=True), 16))


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
