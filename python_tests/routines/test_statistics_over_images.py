"""Statistics of each image and of each class: values, gradients, layouts, and what is refused."""

import copy

import pytest
import torch
from networks import trained_like
from stages import F64, Ranks, close, images, plain
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdkernels.inversion import BatchNormStatistics

MODES = (
    {"mode": "l2"},
    {"mode": "l2", "moment": "std", "mean_weight": 2.0, "var_weight": 0.5},
    {"mode": "l1", "reduction": "sum"},
    {"mode": "squared", "mean_weight": 0.0},
    {"mode": "gaussian_kl"},
)
LABELS = torch.tensor([7, -1, 7, 3, -1, 7])
COUNT = len(LABELS)
PLAIN = "plain"
RUNS = {
    PLAIN: None,
    "checkpoint": lambda stage, x: checkpoint(stage, x, use_reentrant=False),
    "reentrant checkpoint": lambda stage, x: checkpoint(stage, x, use_reentrant=True),
}


def parts_of(over, count=COUNT):
    """Return the images that each of the averaged distances is computed from."""
    if over == "image":
        return [[i] for i in range(count)]
    labels = LABELS[:count].tolist()
    return [[i for i, label in enumerate(labels) if label == c] for c in dict.fromkeys(labels)]


def labels_of(over, count=COUNT):
    return LABELS[:count] if over == "class" else None


def expected_of(model, x, over, weights=None, **options):
    """Return the mean of the losses of sub-batches, each run on its own, and the gradient of it and the outputs."""
    losses = []
    with BatchNormStatistics(model, **options) as statistics:
        for part in parts_of(over, len(x)):
            model(x[part])
            losses.append(statistics.loss(weights))
        loss = torch.stack(losses).mean()
        total = loss + model(x).square().sum()
        return loss, torch.autograd.grad(total, x)[0]


def found_of(model, x, over, weights=None, **options):
    with BatchNormStatistics(model, over=over, **options) as statistics:
        output = model(x)
        loss = statistics.loss(weights, labels=labels_of(over, len(x)))
        (loss + output.square().sum()).backward()
    grad, x.grad = x.grad, None
    return loss, grad


# Values derived by hand


def one_layer():
    """A layer with mean 0 and variance 1, and two images with the values 1, 3 and 5, 9."""
    layer = nn.BatchNorm2d(1).double()
    x = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 9.0]]]], dtype=F64, requires_grad=True)
    return layer, x


def test_images_by_hand():
    """Means 2 and 7, variances 1 and 4: distances 2 + 0 and 7 + 3."""
    layer, x = one_layer()
    with BatchNormStatistics(layer, over="image") as statistics:
        layer(x)
        loss = statistics.loss()
        close(loss, torch.tensor(6.0, dtype=F64))
        (grad,) = torch.autograd.grad(loss, x)
    # (1/2 + (x - 7)) / 2 for the second image; the variance of the first is at a norm of 0.
    close(grad.flatten(), torch.tensor([0.25, 0.25, -0.75, 1.25], dtype=F64))


def test_classes_by_hand():
    """Both images together have mean 4.5 and variance 35 / 4, or 35 / 3 if unbiased."""
    layer, x = one_layer()
    for unbiased, var in ((False, 35 / 4), (True, 35 / 3)):
        with BatchNormStatistics(layer, over="class", unbiased=unbiased) as statistics:
            layer(x)
            loss = statistics.loss(labels=torch.tensor([4, 4]))
            close(loss, torch.tensor(4.5 + var - 1, dtype=F64))
            (grad,) = torch.autograd.grad(loss, x)
            close(grad, 1 / 4 + 2 * (x.detach() - 4.5) / (4 - unbiased))
            alone = statistics.loss(labels=torch.tensor([0, 1]))
            close(alone, torch.tensor((2 + (2 - 1 if unbiased else 0) + 7 + (8 if unbiased else 4) - 1) / 2, dtype=F64))


# Sub-batches on their own


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("over", ["image", "class"])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_loss_equals_that_of_sub_batches(options, over, run):
    x = images(count=COUNT)
    weights = [2.0, 0.0, 0.5]
    loss, grad = expected_of(plain(), x, over, weights, **options)
    found, found_grad = found_of(plain(RUNS[run]), x, over, weights, **options)
    close(found, loss)
    close(found_grad, grad)


@pytest.mark.parametrize("over", ["image", "class"])
@pytest.mark.parametrize("options", [{"unbiased": True}, {"at": "output"}, {"uses": "last"}], ids=str)
def test_other_options(options, over):
    x = images(count=COUNT)
    x = x[[0, 1, 2, 4, 5]].detach().requires_grad_() if over == "image" else x
    loss, grad = expected_of(plain(), x, over, **options)
    found, found_grad = found_of(plain(), x, over, **options)
    close(found, loss)
    close(found_grad, grad)


@pytest.mark.parametrize("over", ["image", "class"])
def test_layers_of_every_rank_and_their_uses(over):
    """A vector has one value for each channel of an image, and variance 0."""
    model = trained_like(Ranks()).double()
    x = torch.randn(COUNT, 3, 5, 6, dtype=F64, requires_grad=True)
    weights = {"vector": 3.0, "image": 0.5}
    loss, grad = expected_of(model, x, over, weights)
    found, found_grad = found_of(model, x, over, weights)
    close(found, loss)
    close(found_grad, grad)
    with BatchNormStatistics(model, over=over) as statistics:
        model(x)
        by_use = statistics.losses(labels=labels_of(over))
    assert list(by_use) == [("volume", 0), ("image", 0), ("image", 1), ("vector", 0)]
    with BatchNormStatistics(model) as statistics:
        parts = []
        for part in parts_of(over):
            model(x[part])
            parts.append(torch.stack(list(statistics.losses().values())))
    close(torch.stack(list(by_use.values())), torch.stack(parts).mean(0))


@pytest.mark.parametrize("over", ["image", "class"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_and_maps(count, size, over):
    model = trained_like(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))).double().eval()
    x = torch.randn(count, 2, size, size, dtype=F64, requires_grad=True)
    loss, grad = expected_of(model, x, over)
    found, found_grad = found_of(model, x, over)
    close(found, loss)
    close(found_grad, grad)


def test_unbiased_classes_of_vectors():
    """Classes of several images have an unbiased variance, although an image has a single value."""
    layer = trained_like(nn.BatchNorm1d(3)).double().eval()
    x = torch.randn(4, 3, dtype=F64)
    labels = torch.tensor([1, 0, 0, 1])
    with BatchNormStatistics(layer, over="class", unbiased=True) as statistics:
        layer(x)
        found = statistics.loss(labels=labels)
        with pytest.raises(ValueError, match=r"a class has a single value for each channel of layer .*unbiased=False"):
            statistics.loss(labels=torch.arange(4))
    expected = [
        (part.mean(0) - layer.running_mean).norm() + (part.var(0) - layer.running_var).norm()
        for part in (x[[0, 3]], x[[1, 2]])
    ]
    close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("over", ["image", "class"])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradcheck(over, options):
    model = trained_like(nn.Sequential(nn.BatchNorm2d(2), nn.Sigmoid(), nn.BatchNorm2d(2))).double().eval()

    def loss(x):
        with BatchNormStatistics(model, over=over, **options) as statistics:
            model(x)
            return statistics.loss(labels=labels_of(over))

    x = torch.randn(COUNT, 2, 2, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("over", ["image", "class"])
def test_layouts(over, layout):
    """The network continues with an activation of the same values and layout."""
    seen = []
    layer = trained_like(nn.BatchNorm2d(4)).double().eval()
    model = nn.Sequential(layer)
    x = torch.randn(COUNT, 4, 5, 8, dtype=F64)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[..., ::2],
    }[layout].requires_grad_()
    loss, grad = expected_of(model, x, over)
    with BatchNormStatistics(model, over=over) as statistics:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        (model(x).square().sum() + statistics.loss(labels=labels_of(over))).backward()
        close(statistics.loss(labels=labels_of(over)), loss)
    close(x.grad, grad)
    assert seen[0].data_ptr() == x.data_ptr()
    assert seen[0].stride() == x.stride()


def test_a_trainable_network():
    """Every image is compared with the running statistics from before each layer's forward."""
    model, x = plain().train(), images(count=4)
    layer, before = model.stages[0][1], copy.deepcopy(model.stages[0][1])
    with BatchNormStatistics(model, over="image", freeze=False, layers=["stages.0.1"]) as statistics:
        model(x)
        found = statistics.loss()
    z = model.stages[0][0](x)
    mean, var = z.mean((2, 3)), z.var((2, 3), unbiased=False)
    assert not torch.equal(layer.running_mean, before.running_mean)
    close(found, ((mean - before.running_mean).norm(dim=1) + (var - before.running_var).norm(dim=1)).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_in_low_precision(dtype):
    """Merging is not done in 16 bits, nor by autocast."""
    layer, x = trained_like(nn.BatchNorm2d(3)).eval(), torch.randn(6, 3, 4, 4).to(dtype)
    with BatchNormStatistics(layer, over="class") as statistics, torch.autocast("cpu", torch.bfloat16):
        layer(x)
        found = statistics.loss(labels=LABELS)
    expected, _ = expected_of(copy.deepcopy(layer).double(), x.double().requires_grad_(), "class")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


# Wrong calls


class Windows(nn.Module):
    """A network whose second layer sees windows of the images as a larger batch."""

    def __init__(self):
        super().__init__()
        self.whole, self.part = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.part(self.whole(x).unflatten(3, (2, -1)).transpose(1, 3).flatten(0, 1).transpose(1, 2))


@pytest.mark.parametrize(
    ("over", "labels", "error", "text"),
    [
        ("batch", LABELS, ValueError, "labels are given, but over='batch' does not use them; leave them out"),
        ("image", LABELS, ValueError, "labels are given, but over='image' does not use them"),
        ("class", None, ValueError, "labels are missing; over='class' needs the label of each image"),
        ("class", [1] * 6, TypeError, r"labels must be a tensor, got list; pass torch.tensor\(labels\)"),
        ("class", LABELS[:5], ValueError, r"labels must be \[6\] of int64, one for each image; got \[5\]"),
        ("class", LABELS[:, None], ValueError, r"got \[6, 1\] of torch.int64"),
        ("class", LABELS.float(), ValueError, r"got \[6\] of torch.float32"),
    ],
)
def test_wrong_labels(over, labels, error, text):
    model = plain()
    with BatchNormStatistics(model, over=over) as statistics:
        model(images(count=6))
        with pytest.raises(error, match=text):
            statistics.loss(labels=labels)
        with pytest.raises(error, match=text):
            statistics.losses(labels=labels)


def test_what_has_no_images_is_refused():
    with pytest.raises(ValueError, match="over is 'pixel'; accepted are 'batch', 'image', 'class'"):
        BatchNormStatistics(plain(), over="pixel")
    layer = nn.BatchNorm1d(3)
    one_value = pytest.raises(ValueError, match=r"\[4, 3\], which has 1 values for each image .* unbiased=False")
    with BatchNormStatistics(layer, over="image", unbiased=True), one_value:
        layer(torch.randn(4, 3))
    with BatchNormStatistics(layer, over="image"), pytest.raises(ValueError, match="has 0 values for each image"):
        layer(torch.randn(0, 3))
    model = Windows()
    with BatchNormStatistics(model, over="image") as statistics:
        model(torch.randn(4, 3, 2, 6))
        with pytest.raises(ValueError, match="layer part got a batch of 8 and layer whole one of 4; over='image'"):
            statistics.loss()
    with BatchNormStatistics(model, over="image", layers=["whole"]) as statistics:
        model(torch.randn(4, 3, 2, 6))
        statistics.loss()
