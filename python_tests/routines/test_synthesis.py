"""Batches of a run: labels, seeds, and whether they worked."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kdkernels.distillation import DataFreeConfig, accuracy, data_free_distill
from kdkernels.distillation.synthesis import balanced_labels, batch_generator, drowned
from kdkernels.inversion import PRESETS
from kdkernels.models import SmallCNN

# Labels and seeds


@pytest.mark.parametrize(("batch_size", "num_classes"), [(4, 10), (20, 10), (7, 3), (32, 1000), (5, 1)])
def test_every_class_has_its_turn(batch_size, num_classes):
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for index in range(70):
        generator = torch.Generator().manual_seed(index)
        labels = balanced_labels(index, batch_size, num_classes, generator)
        counts += labels.bincount(minlength=num_classes)
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == 70 * batch_size
    # Each batch goes on where the last one ended: by hand, 4 images of 10 classes in the third batch.
    if (batch_size, num_classes) == (4, 10):
        labels = balanced_labels(2, 4, 10, torch.Generator().manual_seed(0))
        assert sorted(labels.tolist()) == [0, 1, 8, 9]


def test_labels_of_a_batch_are_in_random_order_and_reproducible():
    first, again = (balanced_labels(3, 20, 10, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, first.sort().values)


# Whether it worked


def test_the_share_of_recognized_images_is_that_of_the_largest_logits():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)).half()
    nn.init.eye_(teacher[1].weight)
    assert accuracy(teacher, torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])) == 0.75


def test_a_term_that_drowns_the_others_is_named():
    history = {"cross_entropy": [3.0, 12.0], "features": [1.0, 16495.0], "tv_l2": [9.0, 0.5], "loss": [13.0, 16507.5]}
    assert drowned(history, 0.03) == (
        "the teacher recognizes 3% of the images, and the weighted term 'features' (1.65e+04) drowns the cross-entropy "
        "(12); choose a smaller feature_weight"
    )
    assert drowned(history, 0.9) is None
    assert drowned({**history, "features": [9e9, 1199.0]}, 0.03) is None
    assert drowned({**history, "features": [0.0, 0.0], "tv_l2": [0.0, 5000.0]}, 0.0).endswith("a smaller tv_l2")
    assert drowned({**history, "features": [0.0, 0.0], "compete": [0.0, -5e3]}, 0.0).endswith("compete_weight")
    assert drowned({"features": [1e9], "loss": [1e9]}, 0.0) is None
    assert drowned({"cross_entropy": [1e-3], "compete_dead": [1.0], "loss": [1e-3]}, 0.0) is None


def test_large_activations_are_warned_of():
    teacher = SmallCNN(4)
    teacher[0].weight.data *= 100
    config = replace(PRESETS["digits"].with_iterations(3), batch_size=20)
    with pytest.warns(UserWarning, match="batch 1: the teacher recognizes .*'features'.* drowns .* feature_weight"):
        data_free_distill(
            teacher, SmallCNN(3), (1, 8, 8), 10, inversion=config, config=DataFreeConfig(batches=1, epochs=1),
            progress=False,
        )  # fmt: skip


def test_seeds_of_batches_do_not_collide():
    numbers = {
        tuple(torch.randint(0, 2**31, (4,), generator=batch_generator(seed, index)).tolist())
        for seed in range(5)
        for index in range(20)
    }
    assert len(numbers) == 100


def test_a_seed_that_is_not_a_number_is_refused():
    with pytest.raises(TypeError, match="seed must be an integer, got None"):
        data_free_distill(SmallCNN(4), SmallCNN(3), (1, 8, 8), 10, inversion=PRESETS["digits"], seed=None)
