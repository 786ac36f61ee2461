"""The pool of synthesized images."""

import pytest
import torch
from safetensors.torch import save_file

from kdkernels.distillation import ImagePool


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


def test_a_gap_is_filled_and_nothing_overwritten(tmp_path):
    pool = ImagePool(tmp_path)
    for index in range(3):
        pool.add(torch.full((2, 1, 4, 4), float(index)), torch.tensor([index, index]))
    (tmp_path / "batch_00001.safetensors").unlink()
    found = ImagePool(tmp_path)
    assert [index in found for index in range(4)] == [True, False, True, False]
    assert found.labels.tolist() == [0, 0, 2, 2]
    found.add(torch.full((2, 1, 4, 4), 3.0), torch.tensor([3, 3]))
    assert found.path(3).is_file()
    with pytest.raises(ValueError, match="the pool has a batch 2 already"):
        found.add(torch.ones(2, 1, 4, 4), torch.tensor([0, 0]), index=2)
    found.add(torch.ones(2, 1, 4, 4), torch.tensor([1, 1]), index=1)
    assert ImagePool(tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (torch.full((2, 1, 4, 4), float("nan")), torch.zeros(2, dtype=torch.int64), "images hold values that are not"),
        (torch.full((2, 1, 4, 4), float("inf")), torch.zeros(2, dtype=torch.int64), "images hold values that are not"),
        (torch.ones(2, 4, 4), torch.zeros(2, dtype=torch.int64), r"images are \[2, 4, 4\] of torch.float32"),
        (torch.ones(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64), r"labels are \[3\] of torch.int64; expected \[2\]"),
        (torch.ones(2, 1, 4, 4), torch.zeros(2), r"labels are \[2\] of torch.float32; expected \[2\] of int64"),
        (torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), r"but the pool has images \[1, 4, 4\]"),
    ],
)
def test_batches_that_are_unfit_are_refused(tmp_path, images, labels, text):
    pool = ImagePool(tmp_path)
    pool.add(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=text):
        pool.add(images, labels)
    assert len(ImagePool(tmp_path)) == len(pool) == 1


def test_damaged_batches_are_named(tmp_path):
    pool = ImagePool(tmp_path)
    pool.add(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]))
    path = tmp_path / "batch_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"batch_00000\.safetensors' is damaged.*; remove that file"):
        ImagePool(tmp_path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"batch_00000\.safetensors holds no images and labels"):
        ImagePool(tmp_path)
    save_file({"images": torch.ones(2, 1, 4, 4), "labels": torch.tensor([0, 1])}, path)
    save_file({"images": torch.ones(2, 3, 4, 4), "labels": torch.tensor([0, 1])}, tmp_path / "batch_00001.safetensors")
    with pytest.raises(ValueError, match=r"batch_00001\.safetensors: images are .* has images \[1, 4, 4\]; remove"):
        ImagePool(tmp_path)
    with pytest.raises(ValueError, match="the pool is empty"):
        _ = ImagePool().images
