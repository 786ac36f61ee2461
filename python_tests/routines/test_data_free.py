"""Distillation without data and its pool of images, including interruptions."""

from dataclasses import replace

import pytest
import torch

from kdkernels.distillation import DataFreeConfig, ImagePool, data_free_distill
from kdkernels.distillation.synthesis import batch_generator
from kdkernels.inversion import PRESETS
from kdkernels.models import SmallCNN

# The pool


def test_pool_keeps_its_batches(tmp_path):
    pool = ImagePool(tmp_path / "pool")
    batches = [(torch.randn(3, 1, 4, 4), torch.arange(3) + i) for i in range(2)]
    for batch in batches:
        pool.add(*batch)
    found = ImagePool(tmp_path / "pool")
    assert len(found) == len(pool) == 2
    assert torch.equal(found.images, torch.cat([images for images, _ in batches]))
    assert torch.equal(found.labels, torch.cat([labels for _, labels in batches]))
    assert len(next(iter(found.loader(4, labels=True)))) == 2
    assert next(iter(found.loader(4)))[0].shape == (4, 1, 4, 4)


# Without data

INVERSION = replace(PRESETS["digits"].with_iterations(3), batch_size=20, compete_weight=1.0)
CONFIG = DataFreeConfig(rounds=2, batches=2, epochs=2, batch_size=16)


def data_free(folder, **options):
    torch.manual_seed(0)
    teacher, student = SmallCNN(4).eval(), SmallCNN(3)
    pool, history = data_free_distill(
        teacher,
        student,
        (1, 8, 8),
        10,
        inversion=INVERSION,
        config=CONFIG,
        seed=5,
        folder=folder,
        progress=False,
        **options,
    )
    return pool, history, student


def test_data_free_loop(tmp_path):
    rounds = []
    pool, history, student = data_free(None, on_round=lambda number, _: rounds.append(number))
    assert rounds == [0, 1]
    assert len(pool) == 4
    assert len(history["loss"]) == 4
    assert torch.equal(pool.labels[:20].bincount(minlength=10), torch.full((10,), 2))
    # The same in a folder, then again from the finished folder
    for _ in range(2):
        kept, kept_history, kept_student = data_free(tmp_path / "run")
        assert torch.equal(kept.images, pool.images)
        assert kept_history == history
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), kept_student.parameters(), strict=True))


@pytest.mark.parametrize("stop_after", ["batch 1", "round 0"])
def test_interrupted_loop_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, stop_after):
    _, expected, straight = data_free(None)
    folder = tmp_path / "run"
    if stop_after == "batch 1":
        original, calls = ImagePool.add, []

        def add(self, images, labels, **options):
            original(self, images, labels, **options)
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(ImagePool, "add", add)
        with pytest.raises(KeyboardInterrupt):
            data_free(folder)
        monkeypatch.setattr(ImagePool, "add", original)
    else:

        def stop(number, _):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            data_free(folder, on_round=stop)
    _, history, student = data_free(folder)
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), student.parameters(), strict=True))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="rounds is 0; expected 1 or more"):
        DataFreeConfig(rounds=0)


def test_seeds_of_batches_do_not_collide():
    numbers = {
        tuple(torch.randint(0, 2**31, (4,), generator=batch_generator(seed, index)).tolist())
        for seed in range(5)
        for index in range(20)
    }
    assert len(numbers) == 100
