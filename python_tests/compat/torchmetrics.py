from functools import partial

from kdkernels.compat.torchmetrics import total_variation

from .conventions import Convention, Project, Trial, normal


def documented(x, reduction="sum"):
    values = (x[..., 1:, :] - x[..., :-1, :]).abs().sum((1, 2, 3)) + (x[..., 1:] - x[..., :-1]).abs().sum((1, 2, 3))
    return {"sum": values.sum(), "mean": values.mean()}.get(reduction, values)


IMAGES = (normal(3, 2, 5, 6, seed=0),)


def names(reduction):
    return {} if reduction is None else {"img": IMAGES[0], "reduction": reduction}


PROJECT = Project(
    name="TorchMetrics",
    repository="Lightning-AI/torchmetrics",
    module="torchmetrics",
    before="from torchmetrics.functional.image import total_variation",
    after="from kdkernels.compat.torchmetrics import total_variation",
    conventions=(
        Convention(
            call='total_variation(img, reduction="sum")',
            takes="images [B, C, H, W]",
            computes="sum of the absolute differences, down and right",
            temperature="",
            divisor='nothing; with "mean" the number of images',
            ours='total_variation(img, reduction, axis_reduction="sum")',
            traps='"mean" is over the images, not over the pixels',
            trials=tuple(
                Trial(
                    str(r),
                    partial(total_variation, reduction=r),
                    partial(documented, reduction=r),
                    IMAGES,
                    names=names(r),
                )
                for r in ("sum", "mean", "none", None)
            ),
        ),
    ),
)
