"""The op of the divergences with every option, and of the losses that have no op of their own."""

import extended
import extended_others
import torch
from contract import OnTheCPU, OpContract

from kdkernels.ops.softmax_divergence.cases import REDUCTIONS
from kdkernels.ops.softmax_divergence.loss_cases import eager_general_loss


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


class TestSoftmaxLoss(OnTheCPU, OpContract):
    op = "softmax_divergence"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 5, 3, 4)
        pairs = [
            (torch.randn(4, 9), torch.randn(4, 9), 1),
            (x.permute(0, 2, 3, 1), torch.randn(2, 3, 4, 5), 3),
            (torch.randn(0, 5), torch.randn(0, 5), 1),
            (torch.randn(3, 6, dtype=torch.bfloat16), torch.randn(3, 6), 1),
            (x, x.flip(0), 1),
        ]
        for i, (s, t, dim) in enumerate(pairs):
            for grad in (False, True):
                s, t = s.detach().requires_grad_(grad), t.detach().requires_grad_(grad)
                positions = s.shape[:dim] + s.shape[dim + 1 :]
                labels = [None, torch.zeros(positions, dtype=torch.int64), torch.rand(s.shape)][i % 3]
                weights = (torch.rand(positions), torch.rand(s.shape[dim]) if labels is not None else None)
                scalars = (
                    scalar(2.0),
                    scalar(1.0),
                    scalar(0.5),
                    scalar(0.3),
                    scalar(0.1 if labels is not None else 0.0),
                )
                reduction = REDUCTIONS[(i + grad) % 4]
                kind = ("logits", "logits", "log_probs")[i % 3]
                options = (dim, "forward_kl" if kind != "logits" else "js", kind, reduction, -100, bool(i % 2))
                common = (s, t, labels, *weights, *scalars, *options)
                for save in ("nothing", "gradient"):
                    yield "softmax_loss", (*common, i % 2 == 0, save)
                grad_output = torch.randn(positions if reduction == "none" else (), requires_grad=grad)
                yield "softmax_loss_backward", (grad_output, *common, True, kind == "logits")

    @classmethod
    def extended(cls, case, arrays, cotangents):
        if getattr(case.eager, "func", None) is not eager_general_loss:
            return extended_others.results(case, arrays, cotangents[0])
        loss, *gradients = extended.softmax_loss(arrays, cotangents[0], **case.eager.keywords)
        return [loss] + [gradients[i] for i in case.differentiable]

    def test_inductor(self):
        self._check_compiled(self.calls()[0], "inductor", None)
