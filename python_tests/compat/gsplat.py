from kdkernels.compat.gsplat import total_variation_loss

from .conventions import Convention, Project, Trial, normal


def documented(x):
    total = 0
    for axis in range(2, x.dim()):
        differences = x.narrow(axis, 1, x.shape[axis] - 1) - x.narrow(axis, 0, x.shape[axis] - 1)
        total = total + (differences**2).sum() / max(differences[0].numel(), 1)
    return total / x.shape[0]


GRIDS = normal(3, 12, 4, 6, 5, seed=0)

PROJECT = Project(
    name="gsplat",
    repository="nerfstudio-project/gsplat",
    module="gsplat",
    before="from lib_bilagrid import total_variation_loss",
    after="from kdkernels.compat.gsplat import total_variation_loss",
    conventions=(
        Convention(
            call="total_variation_loss(x)",
            takes="bilateral grids [N, 12, L, H, W]",
            computes="sum of d² over each axis",
            temperature="",
            divisor="differences along each axis in one grid, and the number of grids",
            ours='total_variation(x, "mean", norm_type="l2_squared", spatial_dims=3)',
            traps="fused-bilagrid has the same function under the same name",
            trials=(
                Trial("bilateral grids", total_variation_loss, documented, (GRIDS,), names={"x": GRIDS}),
                Trial("an axis of size 1", total_variation_loss, documented, (GRIDS[:, :, :1],)),
                Trial("images", total_variation_loss, documented, (normal(2, 3, 4, 5, seed=1),)),
            ),
        ),
    ),
)
