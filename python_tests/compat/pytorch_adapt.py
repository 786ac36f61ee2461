from kdkernels.compat.pytorch_adapt import GradientReversal

from .conventions import Convention, Project, Trial, normal
from .tllib import times_minus


def updated(weight):
    layer = GradientReversal()
    layer.update_weight(weight)
    return layer


FEATURES = (normal(4, 6, seed=0),)

PROJECT = Project(
    name="PyTorch Adapt",
    repository="KevinMusgrave/pytorch-adapt",
    module="pytorch_adapt",
    before="from pytorch_adapt.layers import GradientReversal",
    after="from kdkernels.compat.pytorch_adapt import GradientReversal",
    conventions=(
        Convention(
            call="GradientReversal(weight=1.0)(x)",
            takes="features",
            computes="x; gradient times -weight; `update_weight(w)` changes it",
            temperature="",
            divisor="",
            ours="gradient_reversal(x, weight)",
            traps="the weight is a float32 buffer of shape [1], read in the forward; 16-bit gradients stay 16-bit",
            trials=(
                Trial("the default", GradientReversal(), times_minus(1.0), FEATURES),
                Trial(
                    "0.25",
                    GradientReversal(0.25),
                    times_minus(0.25),
                    FEATURES,
                    names={"x": FEATURES[0], "weight": 0.25},
                ),
                Trial("updated to 0.5", updated(0.5), times_minus(0.5), FEATURES),
            ),
        ),
    ),
)
