"""A learned temperature: its gradient against the formula in float64, its values, and a temperature per sample."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import KERNEL_BACKEND, TARGET

import kdkernels
from kdkernels import nn
from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.ops.softmax_divergence.cases import REDUCTIONS, eager_loss

F64 = torch.float64
FUNCTIONS = {
    "forward_kl": kl_div_with_logits,
    "reverse_kl": partial(kl_div_with_logits, reverse=True),
    "js": partial(js_div_with_logits, beta=0.3),
    "clamped_js": partial(js_div_with_logits, legacy_clamp=True),
}
SHAPES = [(5, 7), (9, 100), (33, 10), (3, 1000)]


def learned(value, dtype=F64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def eager(kind, s, t, temperature, **options):
    """Return a divergence as users write it; `beta` is that of FUNCTIONS."""
    return eager_loss(s, t, temperature=temperature, divergence=kind, beta=0.3, **options)


def gradients(function, s, t, temperature, cotangent):
    """Return the gradients of both sides and of the temperature."""
    leaves = [s.detach().requires_grad_(), t.detach().requires_grad_(), temperature]
    loss = function(*leaves[:2], temperature=temperature)
    return torch.autograd.grad((loss * cotangent.to(loss.dtype)).sum(), leaves)


def test_gradient_of_two_classes(backend):
    """Logits (x, 0) and (0, 0): q = sigmoid(x / T), KL = -ln(2) - ln(q (1 - q)) / 2, dKL/dT = -(q - 1/2) x / T^2."""
    x, temperature = 1.5, learned(2.0)
    s, t = torch.tensor([x, 0.0], dtype=F64), torch.zeros(2, dtype=F64)
    q = 1 / (1 + math.exp(-x / 2))
    loss = kl_div_with_logits(s, t, temperature=temperature)
    assert loss.item() == pytest.approx(-math.log(2) - math.log(q * (1 - q)) / 2, abs=1e-15)
    (grad,) = torch.autograd.grad(loss, temperature)
    assert grad.item() == pytest.approx(-(q - 0.5) * x / 4, rel=1e-13)
    (grad,) = torch.autograd.grad(distillation_loss(s, t, temperature=temperature), temperature)
    assert grad.item() == pytest.approx(2 * 2 * loss.item() - (q - 0.5) * x, rel=1e-13)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", ["normal", "close", "wide"])
def test_gradient_equals_the_formula(backend, kind, dtype, spread):
    """The largest error is at most twice eager PyTorch's own in the dtype of the loss, 8 times for the reference.

    The gradients of both sides are those of a temperature that is a number, bit for bit.
    """
    compute = F64 if dtype == F64 else torch.float32
    ours, eagers = [], []
    for shape in SHAPES:
        s, t = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
        s, t = {"normal": (s, t), "close": (s, s + 0.03 * t), "wide": (s * 30, t * 30)}[spread]
        s, t = s.to(dtype), t.to(dtype)
        cotangent = torch.rand(shape[0])
        function = partial(FUNCTIONS[kind], reduction="none")
        formula = partial(eager, kind, reduction="none")
        *sides, found = gradients(function, s, t, learned(3.0, compute), cotangent)
        leaves = s.clone().requires_grad_(), t.clone().requires_grad_()
        plain = torch.autograd.grad((function(*leaves, temperature=3.0) * cotangent).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(sides, plain, strict=True))
        truth = gradients(formula, s.double(), t.double(), learned(3.0), cotangent)[2]
        eagerly = gradients(formula, s.to(compute), t.to(compute), learned(3.0, compute), cotangent)[2]
        ours.append((abs(found.double() - truth) / abs(truth)).item())
        eagers.append((abs(eagerly.double() - truth) / abs(truth)).item())
    rounding = 1e-9 if dtype == F64 else 1e-6
    assert max(ours) <= max(max(eagers) * (8 if backend == "reference" else 2), rounding), (ours, eagers)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_distillation_to_the_second_order(backend, reduction, divergence):
    """Also with respect to the temperature alone, and with labels to ignore."""
    s, t = torch.randn(4, 6, dtype=F64, requires_grad=True), torch.randn(4, 6, dtype=F64, requires_grad=True)
    labels = torch.tensor([0, -100, 5, 2])

    def loss(s, t, temperature):
        return distillation_loss(s, t, labels, temperature=temperature, reduction=reduction, divergence=divergence)

    def formula(s, t, temperature):
        weights = (0.9 * temperature**2, 0.1)
        return eager_loss(
            s, t, labels, temperature=temperature, divergence=divergence, reduction=reduction, weights=weights
        )

    arguments = (s, t, learned(2.5))
    torch.testing.assert_close(loss(*arguments), formula(*arguments))
    assert torch.autograd.gradcheck(loss, arguments)
    assert torch.autograd.gradgradcheck(loss, arguments)
    assert torch.autograd.gradgradcheck(lambda temperature: loss(s.detach(), t.detach(), temperature), arguments[2:])
    found = torch.func.grad(lambda temperature: loss(s, t, temperature).sum())(torch.tensor(2.5, dtype=F64))
    (expected,) = torch.autograd.grad(formula(*arguments).sum(), arguments[2])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_masks_and_ignored_positions_do_not_matter(backend, kind):
    """Classes at -inf on both sides, and ignored rows that hold NaN: the gradient of what remains."""
    keep, labels = [0, 1, 3, 5], torch.tensor([-100, 1, 0, 3])
    s, t = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    small = gradients(
        partial(distillation_loss, labels=torch.tensor([1, 0, 2]), divergence=kind, beta=0.3),
        s[1:, keep], t[1:, keep], learned(2.0), torch.tensor(0.7),
    )  # fmt: skip
    for x in (s, t):
        x[:, [2, 4]] = -math.inf
        x[0] = math.nan
    large = gradients(
        partial(distillation_loss, labels=labels, divergence=kind, beta=0.3), s, t, learned(2.0), torch.tensor(0.7)
    )
    torch.testing.assert_close(large[2], small[2])
    for a, b in zip(large[:2], small[:2], strict=True):
        torch.testing.assert_close(a[1:, keep], b)
        assert torch.equal(a[0], torch.zeros(6, dtype=F64))


def test_a_class_that_one_side_excludes(backend):
    """p = 0 < q: the gradient is that of a logit far below; where KL is infinite there is none."""
    s, t = torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    t[:, 2] = -math.inf
    far = t.clamp(min=-1500.0)
    for function in (kl_div_with_logits, js_div_with_logits):
        a, b = (gradients(function, s, x, learned(2.0), torch.tensor(1.0)) for x in (t, far))
        torch.testing.assert_close(a[2], b[2])
    infinite = gradients(partial(kl_div_with_logits, reverse=True), s, t, learned(2.0), torch.tensor(1.0))
    assert infinite[2].item() == 0


def test_layouts(backend):
    maps = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    pairs = [
        (maps, torch.randn(2, 3, 5, 6).permute(0, 3, 1, 2), 1),
        (torch.randn(9, 80)[:, ::2], torch.randn(1, 40).expand(9, 40), 1),
        (torch.randn(40, 7), torch.randn(7, 40).t(), 0),
        (torch.randn(0, 5), torch.randn(0, 5), 1),
    ]
    for s, t, dim in pairs:
        for function in (kl_div_with_logits, js_div_with_logits):
            found = gradients(partial(function, dim=dim), s, t, learned(2.0), torch.tensor(1.0))
            rows = [x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in (s, t)]
            expected = gradients(function, *rows, learned(2.0), torch.tensor(1.0))
            torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_sixteen_bits_do_not_overflow(dtype, compiled):
    """T = 300 squared is more than fp16 holds; the weight may be in 16 bits too."""
    s, t = torch.randn(5, 9) * 300, torch.randn(5, 9) * 300
    module = nn.DistillationLoss(temperature=torch.nn.Parameter(torch.tensor(300.0, dtype=dtype)))
    value = module.temperature.item()
    expected = distillation_loss(s, t, temperature=value)
    truth = learned(value)
    eager_loss(s.double(), t.double(), temperature=truth, weights=(truth**2, 0.0)).backward()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    loss = call(s, t)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert module.temperature.grad.dtype == dtype
    assert module.temperature.grad.item() == pytest.approx(truth.grad.item(), rel=1e-2)
    weight = torch.tensor(0.5, dtype=dtype)
    for temperature in (module.temperature, value, torch.tensor(value, dtype=dtype)):
        weighted = distillation_loss(s, t, temperature=temperature, kd_weight=weight)
        torch.testing.assert_close(weighted, expected / 2, rtol=1e-5, atol=0)


def test_modules_learn_a_temperature(backend):
    """The parameter is registered, and steps of it reduce the loss to that of the best temperature."""
    s = torch.randn(64, 10, dtype=F64) * 4
    labels = torch.distributions.Categorical(logits=s / 2.5).sample()
    t = torch.full((64, 10), -math.inf, dtype=F64).scatter(1, labels[:, None], 0.0)
    module = nn.KLDivWithLogitsLoss(temperature=torch.nn.Parameter(torch.tensor(1.0, dtype=F64)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = module(s, t)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = min((F.cross_entropy(s / x, labels).item(), x) for x in torch.linspace(1, 5, 4001, dtype=F64).tolist())
    assert module.temperature.item() == pytest.approx(best[1], abs=2e-3)
    assert module(s, t).item() == pytest.approx(best[0], abs=1e-6)


@pytest.mark.skipif((TARGET, KERNEL_BACKEND) != ("cpu", "native"), reason="the kernels of a GPU take two passes")
def test_one_forward_and_one_backward():
    """The op is called once each way, with the logits as they are."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(a, torch.Tensor) and a.numel() >= 600 for a in args):
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    s, t, temperature = torch.randn(20, 30, requires_grad=True), torch.randn(20, 30), learned(3.0, torch.float32)
    with Recorder():
        distillation_loss(s, t, torch.randint(0, 30, (20,)), temperature=temperature).backward()
    kernels = [f"kdkernels.softmax_divergence{direction}.native" for direction in ("", "_backward")]
    assert [name for name in calls if "detach" not in name] == kernels


# Values that are refused, and a temperature for each sample


@pytest.mark.skipif(TARGET != "cpu", reason="only the CPU kernels read a value")
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits, distillation_loss])
def test_wrong_values_are_refused_everywhere(backend, value, requires_grad, function):
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    temperature = torch.tensor(value, requires_grad=requires_grad)
    calls = [
        lambda: function(s, t, temperature=temperature),
        lambda: torch.compile(function, backend="aot_eager", fullgraph=True)(s, t, temperature=temperature),
        lambda: torch.func.grad(lambda s: function(s, t, temperature=temperature))(s),
        lambda: torch.func.grad(lambda x: function(s, t, temperature=x))(temperature.detach()),
    ]
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=r"temperature .*positive"):
            call()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_a_temperature_per_sample_is_refused_and_the_way_is_named(shape):
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    for function in (kl_div_with_logits, js_div_with_logits, distillation_loss):
        with pytest.raises(ValueError, match=r"divide both logits by it, as in input / T\[:, None\]"):
            function(s, t, temperature=torch.rand(shape) + 1)
    with pytest.raises(ValueError, match=r"shape \(1,\); pass temperature\.squeeze\(\)"):
        kl_div_with_logits(s, t, temperature=torch.ones(1))


def test_the_named_way_equals_a_loop(backend):
    s, t, temperatures = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    divided = (x / temperatures[:, None] for x in (s, t))
    loss = (temperatures**2 * kl_div_with_logits(*divided, reduction="none")).mean()
    rows = [distillation_loss(s[i], t[i], temperature=temperatures[i]) for i in range(4)]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    found = torch.autograd.grad(loss, temperatures)
    torch.testing.assert_close(found, torch.autograd.grad(torch.stack(rows).mean(), temperatures))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_temperatures():
    s, t, temperatures = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1.0, 2.0, 3.0, 4.0])
    kernels = torch.vmap(lambda s, t, x: kl_div_with_logits(s, t, temperature=x))
    divided = [x / temperatures[:, None] for x in (s, t)]
    torch.testing.assert_close(kernels(s, t, temperatures), kl_div_with_logits(*divided, reduction="none"))


def test_reference_and_kernels_agree(backend):
    s, t = torch.randn(6, 50), torch.randn(6, 50)
    labels = torch.randint(0, 50, (6,))
    found = gradients(partial(distillation_loss, labels=labels), s, t, learned(4.0, torch.float32), torch.tensor(3.0))
    with kdkernels.set_backend("reference"):
        truth = gradients(
            partial(distillation_loss, labels=labels), s.double(), t.double(), learned(4.0), torch.tensor(3.0)
        )
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
