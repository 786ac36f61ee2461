import torch

from kdkernels.compat.deep_inversion import DeepInversionFeatureHook, get_image_prior_losses

from .conventions import Convention, Project, Trial, normal


def layer_of(kind, channels):
    layer = kind(channels).double().eval()
    layer.running_mean.copy_(normal(channels, seed=1))
    layer.running_var.copy_(normal(channels, seed=2).square() + 0.5)
    return layer


def hooked(layer):
    def r_feature(x):
        hook = DeepInversionFeatureHook(layer)
        layer(x)
        hook.close()
        return hook.r_feature

    return r_feature


def distance(layer):
    def r_feature(x):
        values = x.transpose(0, 1).flatten(1)
        var, mean = values.var(1, unbiased=False), values.mean(1)
        return (layer.running_var - var).norm() + (layer.running_mean - mean).norm()

    return r_feature


def priors(x):
    differences = (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    )
    tv_l1 = sum((d.abs() / 255).mean() for d in differences) * 255
    return tv_l1, sum(d.norm() for d in differences)


IMAGES = normal(3, 4, 6, 5, seed=0)
LAYERS = {"images": layer_of(torch.nn.BatchNorm2d, 4), "volumes": layer_of(torch.nn.BatchNorm3d, 4)}
HOOKED = {"x": IMAGES, "module": LAYERS["images"]}

PROJECT = Project(
    name="DeepInversion",
    repository="NVlabs/DeepInversion",
    module="deep_inversion",
    before="from deepinversion import DeepInversionFeatureHook, get_image_prior_losses",
    after="from kdkernels.compat.deep_inversion import DeepInversionFeatureHook, get_image_prior_losses",
    conventions=(
        Convention(
            call="DeepInversionFeatureHook(module).r_feature",
            takes="a BatchNorm layer; its input in the latest forward",
            computes="norm of (running_var - var) + norm of (running_mean - mean), variance biased",
            temperature="",
            divisor="nothing; norms over the channels, not squared",
            ours="batch_norm_stat_loss(x, module.running_mean, module.running_var)",
            traps="`kdkernels.inversion.BatchNormStatistics` computes the sum over all layers in fewer passes",
            trials=(
                Trial("images", hooked(LAYERS["images"]), distance(LAYERS["images"]), (IMAGES,), names=HOOKED),
                Trial(
                    "volumes", hooked(LAYERS["volumes"]), distance(LAYERS["volumes"]), (normal(2, 4, 3, 2, 5, seed=3),)
                ),
            ),
        ),
        Convention(
            call="get_image_prior_losses(inputs_jit)",
            takes="images [B, C, H, W]",
            computes="(sum of mean |d|, sum of norms of d) over four directions",
            temperature="",
            divisor="l1: pairs of each direction; l2: nothing, norms over the whole batch",
            ours="image_prior_losses(x)[:2]",
            traps="the second grows with the root of the batch size",
            trials=(Trial("images", get_image_prior_losses, priors, (IMAGES,), names={"x": IMAGES}),),
        ),
    ),
)
