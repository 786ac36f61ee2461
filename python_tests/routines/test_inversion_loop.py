"""The loop of DeepInversion: what it draws, what it keeps, and that it runs on the device alone."""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inverted import COLOURED, EVERYTHING, inverter_of, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels.inversion import PRESETS, DeepInversion, Stage
from kdkernels.inversion import _loop as loops
from kdkernels.inversion._augmentation import Augmentation, move, positions_of

CPU = torch.device("cpu")
F64 = torch.float64

# What is drawn


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (9, 20)])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_a_move_is_a_roll_and_a_flip_bit_for_bit(size, shift, flip):
    images = torch.randn(2, 3, *size, requires_grad=True)
    positions = positions_of(*size, shift, flip, CPU)
    expected = torch.roll(images, shift, (2, 3))
    expected = expected.flip(3) if flip else expected
    found = move(images, positions)
    assert torch.equal(found, expected)
    assert torch.equal(move(images.to(memory_format=torch.channels_last), positions), expected)
    gradient = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad(moved, images, gradient)[0] for moved in (found, expected)))


def test_derivatives_of_a_move():
    images, positions = torch.randn(2, 1, 3, 4, dtype=F64, requires_grad=True), positions_of(3, 4, (1, 2), True, CPU)
    assert torch.autograd.gradcheck(lambda x: move(x, positions) ** 2, images)
    assert torch.autograd.gradgradcheck(lambda x: move(x, positions) ** 2, images)


class Counting(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_the_backward_of_a_move_is_a_gather():
    images = torch.randn(2, 1, 3, 4, requires_grad=True)
    moved = move(images, positions_of(3, 4, (1, 2), True, CPU))
    with Counting() as counting:
        moved.sum().backward()
    assert counting.counts["index_select"] == 1
    assert not {name for name in counting.counts if "put" in name or "add" in name or "scatter" in name}


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("jitter", [0, 5])
def test_a_seed_gives_the_draws_of_a_loop_that_draws_in_each_iteration(jitter, flip, pool):
    config = replace(PRESETS["digits"], jitter=jitter, flip=flip)
    generator, reference = seeded(3), seeded(3)
    augmentation = Augmentation(config, Stage(40, pool), (6, 9), generator, CPU)
    flips = 0
    for iteration in range(40):
        down, right = torch.randint(-(jitter // pool), jitter // pool + 1, (2,), generator=reference).tolist()
        flipped = flip > 0 and torch.rand((), generator=reference).item() < flip
        flips += flipped
        found = augmentation.at(torch.tensor([iteration]))
        if found is None:
            assert (down, right, flipped) == (0, 0, False)
            assert (jitter, flip) == (0, 0.0)
        else:
            assert all(map(torch.equal, found, positions_of(6, 9, (down, right), flipped, CPU)))
    assert torch.equal(generator.get_state(), reference.get_state())
    assert flips == {0.0: 0, 1.0: 40}.get(flip, flips)


# What an iteration does


def stepped(config, inverter, labels, generator):
    """Return the images after all iterations and the losses, from the objective and torch's own operations."""
    images = torch.randn(len(labels), *inverter.image_shape, generator=generator).double().requires_grad_()
    losses, best, best_loss = [], None, float("inf")
    for stage in config.stages:
        optimizer = torch.optim.Adam([images], lr=1.0, betas=config.betas, foreach=False)
        best_loss = float("inf")
        for iteration in range(stage.iterations):
            optimizer.param_groups[0]["lr"] = loops.learning_rate_at(config, iteration, stage.iterations)
            jitter = config.jitter // stage.pool
            shift = tuple(torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist())
            flip = config.flip > 0 and torch.rand((), generator=generator).item() < config.flip
            loss = inverter.objective(images, labels, pool=stage.pool, shift=shift, flip=flip)["loss"]
            (images.grad,) = torch.autograd.grad(loss, images)
            losses.append(loss.item())
            if loss.item() < best_loss:
                best_loss, best = loss.item(), images.detach().clone()
            optimizer.step()
            if config.clip:
                mean, std = (torch.tensor(v, dtype=F64).view(-1, 1, 1) for v in (config.mean, config.std))
                with torch.no_grad():
                    images.copy_(torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std))
    return best if config.keep == "best" else images.detach(), losses


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_the_loop_takes_the_steps_of_its_preset(name, memory_format):
    config = EVERYTHING
    if name != "everything":
        stages = tuple(replace(stage, iterations=4 + stage.pool) for stage in PRESETS[name].stages)
        config = replace(PRESETS[name], stages=stages, **COLOURED)
    inverter = inverter_of(config, F64, memory_format=memory_format)
    labels = torch.arange(6)
    images, losses = stepped(config, inverter, labels, seeded(2))
    found = inverter.synthesize(labels, generator=seeded(2))
    torch.testing.assert_close(found.images, images, rtol=1e-10, atol=1e-11)
    assert found.history["loss"] == pytest.approx(losses, rel=1e-11)


READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}


@pytest.mark.parametrize("keep", ["last", "best", "best_per_image"])
@pytest.mark.parametrize("execution", [{}, {"autocast": "bf16"}, {"autocast": "fp16"}], ids=str)
def test_an_iteration_reads_nothing_back(keep, execution):
    config = replace(EVERYTHING, keep=keep, stages=(Stage(30, pool=2), Stage(20)))
    with inverter_of(config, **execution).loop(torch.arange(6), generator=seeded()) as loop:
        for iteration in range(loop.total):
            with Counting() as counting:
                loop.step()
            checks = (iteration + 1) % 20 == 0 or iteration + 1 == loop.total
            begins = iteration in (0, 30)
            assert sum(counting.counts.values()) > 100
            if not checks and not begins:
                # Numbers of the host, which lift_fresh shows, would have to be copied to the device.
                assert not {*READS, "lift_fresh"} & counting.counts.keys(), iteration


def test_a_loop_frees_its_memory_when_it_ends():
    """Without the garbage collector, which may run much later."""
    gc.disable()
    try:
        with inverter_of(replace(EVERYTHING, stages=(Stage(2),))).loop(torch.arange(3)) as loop:
            loop.step()
            images = weakref.ref(loop.images)
        del loop
        assert images() is None
    finally:
        gc.enable()


def test_a_loop_ends():
    with inverter_of(replace(EVERYTHING, stages=(Stage(2),))).loop(torch.arange(3)) as loop:
        loop.step(), loop.step()
        with pytest.raises(RuntimeError, match="the 2 iterations of the synthesis are done"):
            loop.step()


# What is kept


def images_of_iterations(inverter, labels):
    """Return the images of every iteration, which the network sees as they are without jitter, and the synthesis."""
    seen = []
    handle = inverter.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    result = inverter.synthesize(labels, generator=seeded())
    handle.remove()
    return seen, result


@pytest.mark.parametrize("compete", ["js", "nvlabs", "datafree"])
@pytest.mark.parametrize("l2_norm", ["image", "batch"])
def test_the_best_of_each_image(compete, l2_norm):
    """The loss of an image has its own cross-entropy, divergence and norm, and the terms of the batch as they are."""
    config = replace(
        EVERYTHING, stages=(Stage(12),), jitter=0, flip=0.0, keep="best_per_image", schedule="constant",
        learning_rate=0.05,
        feature_weight=0.01, ce_weight=2.0, compete_weight=3.0, l2=0.2, l2_norm=l2_norm, compete=compete,
    )  # fmt: skip
    inverter, labels = inverter_of(config, F64), torch.arange(8)
    for model in (inverter.teacher, inverter.student):
        model[-1].weight.data *= 20  # logits that matter beside the terms of the batch
    seen, result = images_of_iterations(inverter, labels)
    assert len(seen) == 12
    teacher, student = inverter.teacher.eval(), inverter.student.eval()
    losses = []
    for images in seen:
        terms = {name: term.item() for name, term in inverter.objective(images, labels).items()}
        with torch.no_grad():
            logits, others = teacher(images), student(images)
            p, q = (logits / 3).softmax(1), (others / 3).softmax(1)
            if compete == "js":
                m = (p + q) / 2
                divergence = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)
            else:
                p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
                divergence = 0.5 * (m * (m / p).log() + m * (m / q).log()).sum(1)
            own = {"js": 1 - divergence, "nvlabs": 1 - divergence.clamp(0, 1), "datafree": -divergence}[compete]
            own = 3 * own + 2 * F.cross_entropy(logits, labels, reduction="none")
            if l2_norm == "image":
                own += 0.2 * images.flatten(1).norm(dim=1)
        losses.append(terms["loss"] + own - own.mean())
    chosen = torch.stack(losses).argmin(0)
    assert len(set(chosen.tolist())) > 1  # the best iteration differs from image to image
    expected = torch.stack([seen[iteration][image] for image, iteration in enumerate(chosen.tolist())])
    assert torch.equal(result.images, expected)


def test_images_of_the_last_stage_are_kept():
    """Losses of pooled images are others than those of whole ones."""
    config = replace(EVERYTHING, stages=(Stage(3, pool=2), Stage(1)), jitter=0, flip=0.0, keep="best_per_image")
    inverter = inverter_of(config)
    seen, result = images_of_iterations(inverter, torch.arange(4))
    assert torch.equal(result.images, seen[-1])


# What is told


def test_the_share_of_images_without_competition_by_hand():
    """Probabilities of the published form that are all clamped, or none; J outside of [0, 1]; equal logits of JS."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)).double()
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)).double()
    nn.init.eye_(teacher[1].weight), nn.init.eye_(student[1].weight)
    labels = torch.arange(3)

    def share(images, weights, compete):
        student[1].weight.data.copy_(torch.tensor(weights, dtype=F64).diag())
        config = replace(
            PRESETS["digits"], feature_weight=0.0, stages=(Stage(1),), jitter=0, compete_weight=1.0, compete=compete
        )
        images = torch.tensor(images, dtype=F64).view(3, 1, 2, 2)
        inverter = DeepInversion(teacher, (1, 2, 2), config, student=student)
        with inverter.loop(labels, images=images) as loop:
            loop.step()
            return loop.terms()["compete_dead"].item()

    # Divided by the temperature 3 and by the largest logit, the softmax of (30, 0, 0, 0) is (0.99986, 0.00005, ...).
    confident, even = [30.0, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]
    assert share([confident, even, even], [1.0, 1.0, 2.0, 1.0], "datafree") == pytest.approx(1 / 3)
    assert share([confident] * 3, [1.0] * 4, "datafree") == 1
    # All probabilities clamped alike: J = 0 for each, but two others have a gradient; the clamp of the mean has none.
    opposed = [[20.0, 0.0, 0.0, 0.0]] * 3
    assert share(opposed, [-1.0, 1.0, 1.0, 1.0], "nvlabs") == 1  # J > 1
    assert share(opposed, [-1.0, 1.0, 1.0, 1.0], "js") == 0
    assert share([even, even, confident], [1.0] * 4, "js") == 1  # equal logits
    assert share([even, even, [0.0] * 4], [2.0, 1.0, 1.0, 1.0], "js") == pytest.approx(1 / 3)


def test_gradient_norms_are_those_of_each_term():
    inverter = inverter_of(EVERYTHING, F64)
    images, labels = torch.randn(4, 3, 12, 10, dtype=F64), torch.arange(4)
    options = {"pool": 2, "shift": (1, -1), "flip": True}
    with torch.no_grad():
        norms = inverter.gradient_norms(images, labels, **options)
    assert list(norms) == ["cross_entropy", "features", "tv_l1", "tv_l2", "l2", "compete", "loss"]
    for name, norm in norms.items():
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(inverter.objective(leaf, labels, **options)[name], leaf)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-12), name
        assert norm > 0
    assert images.grad is None
