"""Losses over a support: on gathered log-probabilities, and fused with the head."""

from asyncopd.backends.loss_spec import LossMetrics
from asyncopd.losses.correction import Correction
from asyncopd.losses.kl import forward_kl, reverse_kl
from asyncopd.losses.linear import (
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    linear_forward_kl,
    linear_reverse_kl,
)

__all__ = [
    "Correction",
    "LinearForwardKLLoss",
    "LinearReverseKLLoss",
    "LossMetrics",
    "forward_kl",
    "linear_forward_kl",
    "linear_reverse_kl",
    "reverse_kl",
]
