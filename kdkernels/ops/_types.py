"""Types of the options that accept certain strings."""

from typing import Literal

Reduction = Literal["none", "mean", "sum", "batchmean"]
ChannelReduction = Literal["mean", "sum"]
Mode = Literal["l2", "l1", "squared", "gaussian_kl"]
Moment = Literal["var", "std"]
ValuesType = Literal["log_probs", "logits"]
Tail = Literal["bucket", "renormalize", "ignore"]
Divergence = Literal["forward_kl", "reverse_kl", "js"]
TargetType = Literal["logits", "log_probs", "probs"]
