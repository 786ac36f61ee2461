from functools import partial

from kdkernels.compat.piq import TVLoss, total_variation

from .conventions import Convention, Project, Trial, normal

NORMS, REDUCTIONS = ("l1", "l2", "l2_squared"), ("mean", "sum", "none")


def documented(x, reduction="mean", norm_type="l2"):
    power = 1 if norm_type == "l1" else 2
    right, down = (x[..., 1:] - x[..., :-1]).abs() ** power, (x[..., 1:, :] - x[..., :-1, :]).abs() ** power
    values = right.sum((1, 2, 3)) + down.sum((1, 2, 3))
    if norm_type == "l2":
        values = values.sqrt()
    return {"sum": values.sum(), "mean": values.mean(), "none": values}[reduction]


IMAGES = (normal(3, 2, 5, 6, seed=0).abs(),)
DEFAULTS = {"x": IMAGES[0], "reduction": "mean", "norm_type": "l2"}

PROJECT = Project(
    name="PIQ",
    repository="photosynthesis-team/piq",
    module="piq",
    before="from piq import TVLoss, total_variation",
    after="from kdkernels.compat.piq import TVLoss, total_variation",
    conventions=(
        Convention(
            call='total_variation(x, reduction="mean", norm_type="l2")',
            takes="images [B, C, H, W]",
            computes="sum of |d|, root of the sum of d², or sum of d² over each image",
            temperature="",
            divisor='nothing; with "mean" the number of images',
            ours='total_variation(x, reduction, norm_type=norm_type, axis_reduction="sum")',
            traps='"l2" is one norm over the image, not the isotropic total variation; its gradient at a constant '
            "image is 0, where the project's is NaN",
            trials=tuple(
                Trial(
                    f"{n}, {r}",
                    partial(total_variation, reduction=r, norm_type=n),
                    partial(documented, reduction=r, norm_type=n),
                    IMAGES,
                    names={"x": IMAGES[0], "reduction": r, "norm_type": n},
                )
                for n in NORMS
                for r in REDUCTIONS
            ),
        ),
        Convention(
            call='TVLoss(norm_type="l2", reduction="mean")(x)',
            takes="images [B, C, H, W]",
            computes="the same",
            temperature="",
            divisor="the same",
            ours='total_variation(x, reduction, norm_type=norm_type, axis_reduction="sum")',
            traps="the options come in another order than the function's",
            trials=(
                Trial("the default", TVLoss(), documented, IMAGES, names=DEFAULTS),
                Trial("l1, sum", TVLoss("l1", "sum"), partial(documented, reduction="sum", norm_type="l1"), IMAGES),
            ),
        ),
    ),
)
