"""Networks and the published feature loss for the tests of the inversion."""

import torch
from torch import nn


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(3)


def trained_like(model, seed=0):
    """Return the model with running statistics and scales unlike those of a new model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def hooked_loss(model, x, mode="l2"):
    """Return the feature term as users write it: hooks on the inputs, in execution order."""
    losses, names = [], []

    def hook_of(name):
        def hook(module, arguments):
            z = arguments[0]
            dims = [d for d in range(z.dim()) if d != 1]
            mean, var = z.mean(dims), z.var(dims, unbiased=False)
            m, r = module.running_mean, module.running_var
            if mode == "l2":
                losses.append((var - r).norm() + (mean - m).norm())
            else:
                v, r = var + 1e-8, r + 1e-8
                losses.append((torch.log(v.sqrt() / r.sqrt()) - 0.5 * (1 - (r + (m - mean) ** 2) / v)).mean())
            names.append(name)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    training = model.training
    model.eval()
    outputs = model(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return losses, names, outputs
