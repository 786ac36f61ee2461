"""Networks for the tests of the statistics, and what hooks would find in them."""

import torch
from networks import hooked_loss, trained_like
from torch import nn

F64 = torch.float64


class Ranks(nn.Module):
    """Batch normalization in three ranks, with one layer used twice."""

    def __init__(self):
        super().__init__()
        self.volume = nn.BatchNorm3d(3)
        self.image = nn.BatchNorm2d(3)
        self.vector = nn.BatchNorm1d(3)

    def forward_features(self, x):
        x = self.volume(x[:, :, None]).relu()[:, :, 0]
        return self.image(self.image(x) * 0.7)

    def forward_head(self, x):
        return self.vector(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Plain(nn.Module):
    """Convolutions and batch normalization in three stages, each run by ``run``, and no layer twice."""

    def __init__(self, run=None):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()) for c in (2, 4, 4)
        )
        self.head = nn.Linear(4, 3)
        self.run = run

    def forward_features(self, x):
        for stage in self.stages:
            x = self.run(stage, x) if self.run else stage(x)
        return x

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


def plain(run=None):
    """Return the same network in float64, whatever runs its stages."""
    torch.manual_seed(0)
    return trained_like(Plain(run)).double()


def images(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 5, dtype=F64, generator=generator).requires_grad_()


def expected_of(model, x):
    """Return the loss by hooks, and the gradient of output and loss."""
    losses, _, output = hooked_loss(model, x)
    return sum(losses), torch.autograd.grad(output.square().sum() + sum(losses), x)[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
