"""Group norm and an activation, by their formulas: the definition that every backend is compared with."""

import math

import torch
from torch import Tensor


def group_norm_act_ref(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    """act((x - mean) / sqrt(variance + eps) weight + bias), mean and variance of each group of channels of each map.

    Shapes: x (n, c, h, w), weight and bias (c) -> (n, c, h, w).
    """
    grouped = x.unflatten(1, (groups, -1))
    centred = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = (centred**2).mean(dim=(2, 3, 4), keepdim=True)
    z = (centred / torch.sqrt(variance + eps)).flatten(1, 2) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    if activation == "elu":
        return torch.where(z > 0, z, torch.exp(z) - 1)
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
