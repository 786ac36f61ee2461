"""Types of the options that accept certain strings."""

from typing import Literal

Reduction = Literal["none", "mean", "sum", "batchmean"]
Mode = Literal["l2", "squared", "gaussian_kl"]
Moment = Literal["var", "std"]
