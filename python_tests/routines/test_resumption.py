"""Training that was interrupted, and checkpoints of another run."""

import random

import pytest
import torch
from distilled import loader_of, setup, train
from torch.utils.data import DataLoader

from kdkernels.distillation import distill
from kdkernels.models import SmallCNN


class InterruptedError(Exception):
    pass


class Interrupting:
    """A loader that stops the run after some batches."""

    def __init__(self, loader, after):
        self.loader, self.left = loader, after

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise InterruptedError
            self.left -= 1
            yield batch


def test_interrupted_training_ends_like_an_uninterrupted_one(tmp_path):
    x = torch.randn(48, 1, 8, 8)
    teacher, straight, options = setup()
    expected = distill(straight, teacher, loader_of(x), **options)

    teacher, student, options = setup()
    checkpoint = tmp_path / "run" / "student.pt"
    with pytest.raises(InterruptedError):
        distill(student, teacher, Interrupting(loader_of(x), 7), checkpoint=checkpoint, **options)
    teacher, resumed, options = setup()
    torch.randn(5)  # the generator's state must not matter
    history = distill(resumed, teacher, loader_of(x), checkpoint=checkpoint, **options)
    assert history == expected
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_checkpoint_of_more_epochs_is_refused(tmp_path):
    teacher, student, options = setup(epochs=2)
    checkpoint = tmp_path / "student.pt"
    loader = loader_of(torch.randn(16, 1, 8, 8))
    distill(student, teacher, loader, checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match=r"epochs is 1, but .* already holds 2 epochs"):
        distill(student, teacher, loader, checkpoint=checkpoint, **{**options, "epochs": 1})
    with pytest.raises(ValueError, match="epochs is -1"):
        distill(student, teacher, loader, **{**options, "epochs": -1})


# Checkpoints of another run


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 5.0}, "temperature was 4.0 and is 5.0"),
        ({"kd_weight": 2.0}, "kd_weight was not set and is 2.0"),
        ({"divergence": "js"}, "divergence was 'forward_kl' and is 'js'"),
        ({"teacher": SmallCNN(6)}, "teacher was '.*' and is '.*'"),
        (
            {"optimizer": lambda g: torch.optim.SGD(g["student"].parameters(), lr=5e-3), "scheduler": None},
            "optimizer was 'Adam' and is",
        ),
        (
            {"optimizer": lambda g: torch.optim.Adam(g["student"].parameters(), lr=1e-3), "scheduler": None},
            "lr was 0.005 and is 0.001",
        ),
        ({"loader": lambda g: DataLoader(g["loader"].dataset, 8)}, "batch_size was 16 and is 8; batches was 2 and is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, text):
    checkpoint = tmp_path / "student.pt"
    train(checkpoint=checkpoint)
    assert train(checkpoint=checkpoint)  # the same run
    with pytest.raises(ValueError, match=rf"holds another run: .*{text}"):
        train(checkpoint=checkpoint, **change)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    teacher, student, options = setup()
    distill(student, teacher, [torch.randn(4, 1, 8, 8)], checkpoint=tmp_path / "c.pt", **options)
    teacher, student, options = setup()
    torch.manual_seed(1)
    images = [torch.randn(4, 1, 8, 8)]
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError, match="holds another run: seed was 0 and is 1"):
        distill(student, teacher, images, checkpoint=tmp_path / "c.pt", **options)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_more_epochs_of_the_same_run(tmp_path):
    x = torch.randn(48, 1, 8, 8)
    expected = train(loader=loader_of(x), epochs=3, scheduler=None)
    train(loader=loader_of(x), epochs=1, scheduler=None, checkpoint=tmp_path / "c.pt")
    assert train(loader=loader_of(x), epochs=3, scheduler=None, checkpoint=tmp_path / "c.pt") == expected


def test_a_loader_with_its_own_generator_resumes_identically(tmp_path):
    x = torch.randn(48, 1, 8, 8)

    def loader():
        return DataLoader(x, 16, shuffle=True, generator=torch.Generator().manual_seed(7))

    expected = train(loader=loader(), epochs=3)
    train(loader=loader(), epochs=1, checkpoint=tmp_path / "c.pt")
    assert train(loader=loader(), epochs=3, checkpoint=tmp_path / "c.pt") == expected


def test_a_state_that_cannot_be_saved_is_found_before_the_first_step(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"code": print}

    with pytest.raises(ValueError, match=r"the state of optimizer \(Odd\) cannot be saved"):
        train(optimizer=lambda g: Odd(g["student"].parameters(), lr=0.1), checkpoint=tmp_path / "c.pt", scheduler=None)
    assert list(tmp_path.iterdir()) == []
