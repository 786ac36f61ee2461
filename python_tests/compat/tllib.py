import math

import torch

from kdkernels.compat.tllib import GradientReverseLayer, WarmStartGradientReverseLayer

from .conventions import Convention, Project, Trial, normal


def times_minus(coeff):
    """Return a function with the value of the identity and a gradient of -coeff."""

    def reverse(x):
        return x.detach() - coeff * (x - x.detach())

    return reverse


def schedule(i, alpha=1.0, lo=0.0, hi=1.0, max_iters=1000):
    return 2 * (hi - lo) / (1 + math.exp(-alpha * i / max_iters)) - (hi - lo) + lo


def after(steps, **options):
    layer = WarmStartGradientReverseLayer(**options)
    for _ in range(steps):
        layer.step()
    return layer


def called(times, **options):
    """Return a function that calls a layer several times, and gives the last result."""

    def reverse(x):
        layer = WarmStartGradientReverseLayer(auto_step=True, **options)
        return torch.stack([layer(x) for _ in range(times)])[-1]

    return reverse


FEATURES = (normal(4, 6, seed=0),)
LAYER = GradientReverseLayer()
STEPPED = {"input": FEATURES[0], "math": math, "lo": 0.0, "hi": 1.0, "alpha": 1.0, "i": 1000, "N": 1000}
SLOW = {"alpha": 10.0, "lo": 0.1, "hi": 0.7, "max_iters": 50}

PROJECT = Project(
    name="Transfer Learning Library",
    repository="thuml/Transfer-Learning-Library",
    module="tllib",
    before="from tllib.modules.grl import WarmStartGradientReverseLayer",
    after="from kdkernels.compat.tllib import WarmStartGradientReverseLayer",
    conventions=(
        Convention(
            call="GradientReverseLayer()(input, coeff=1.)",
            takes="features",
            computes="input; gradient times -coeff",
            temperature="",
            divisor="",
            ours="gradient_reversal(input, coeff)",
            traps="the output is a view of the input, not a copy: an in-place layer right behind it raises",
            trials=(
                Trial("the default", LAYER, times_minus(1.0), FEATURES),
                Trial(
                    "0.3",
                    lambda x: LAYER(x, 0.3),
                    times_minus(0.3),
                    FEATURES,
                    names={"input": FEATURES[0], "coeff": 0.3},
                ),
            ),
        ),
        Convention(
            call="WarmStartGradientReverseLayer(alpha=1.0, lo=0.0, hi=1., max_iters=1000, auto_step=False)(input)",
            takes="features",
            computes="input; gradient times -(2 (hi - lo) / (1 + exp(-alpha i / N)) - (hi - lo) + lo), i steps of N",
            temperature="",
            divisor="",
            ours="gradient_reversal(input, lo + (hi - lo) * math.tanh(alpha * i / N / 2))",
            traps="with alpha=1 the coefficient is 0.46 after N steps, where the DANN paper's 10 gives 0.9999; "
            "checkpoints do not keep the count",
            trials=(
                Trial("before a step", after(0), times_minus(0.0), FEATURES),
                Trial("after 1000 steps", after(1000), times_minus(schedule(1000)), FEATURES, names=STEPPED),
                Trial("after 30 of 50", after(30, **SLOW), times_minus(schedule(30, **SLOW)), FEATURES),
                Trial("the third call", called(3, **SLOW), times_minus(schedule(2, **SLOW)), FEATURES),
            ),
        ),
    ),
)
