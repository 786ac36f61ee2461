from functools import partial

from kdkernels.compat.kornia import TotalVariation, total_variation

from .conventions import Convention, Project, Trial, normal


def documented(x, reduction="sum"):
    vertical = (x[..., 1:, :] - x[..., :-1, :]).abs()
    horizontal = (x[..., :, 1:] - x[..., :, :-1]).abs()
    over = (-2, -1)
    if reduction == "mean":
        return vertical.mean(over) + horizontal.mean(over)
    return vertical.sum(over) + horizontal.sum(over)


IMAGES = (normal(2, 3, 5, 6, seed=0),)
NAMES = {"img": IMAGES[0], "H": 5, "W": 6}

PROJECT = Project(
    name="Kornia",
    repository="kornia/kornia",
    module="kornia",
    before="from kornia.losses import total_variation",
    after="from kdkernels.compat.kornia import total_variation",
    conventions=(
        Convention(
            call='total_variation(img, reduction="sum")',
            takes="images [..., H, W]",
            computes="sum of the absolute differences, down and right",
            temperature="",
            divisor='nothing, or with "mean" the pairs of each direction; one value for each channel, [...]',
            ours='total_variation(img.reshape(-1, 1, H, W), "none", axis_reduction=reduction).reshape(img.shape[:-2])',
            traps="a value for each channel, not for each image; integers are refused",
            trials=(
                Trial("sum", total_variation, documented, IMAGES, names={**NAMES, "reduction": "sum"}),
                Trial(
                    "mean", partial(total_variation, reduction="mean"), partial(documented, reduction="mean"), IMAGES
                ),
                Trial("one plane", total_variation, documented, (normal(4, 7, seed=1),)),
                Trial("five dimensions", total_variation, documented, (normal(2, 2, 3, 4, 5, seed=2),)),
                Trial("transposed", total_variation, documented, (normal(2, 3, 5, 6, seed=3).transpose(1, 3),)),
            ),
        ),
        Convention(
            call="TotalVariation()(img)",
            takes="images [..., H, W]",
            computes="the same",
            temperature="",
            divisor="nothing",
            ours='total_variation(img.reshape(-1, 1, H, W), "none").reshape(img.shape[:-2])',
            traps="",
            trials=(Trial("images", TotalVariation(), documented, IMAGES, names=NAMES),),
        ),
    ),
)
