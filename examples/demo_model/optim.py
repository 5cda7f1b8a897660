"""Muon for matrices and stacks of matrices, AdamW for everything else.

`torch.optim.Muon` takes matrices only, while the experts of a layer are one [E, rows, columns] parameter.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz step, from Keller Jordan's Muon


def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """Replace every matrix G = U S V^T by about U V^T.

    Args:
        gradient: float [..., rows, columns].
        steps: Newton-Schulz iterations.

    Returns:
        The same shape and dtype, singular values in about 0.7..1.2.
    """
    a, b, c = NS_COEFFICIENTS
    x = gradient / (gradient.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class BatchedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over the last two dimensions of each parameter."""

    def __init__(self, params: list[dict], lr: float, momentum: float = 0.95) -> None:
        """Optimize groups of parameters, each [..., rows, columns]."""
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))
                scale = max(1, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(
    module: nn.Module, muon_lr: float, adamw_lr: float, tower: Collection[str] = (), tower_scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks; AdamW for embeddings, heads, routers, norms, biases and convolutions.

    The learning rates of the modules named in `tower` are `tower_scale` times the others'.
    """
    kinds = {"muon": muon_lr, "adamw": adamw_lr}
    groups = {kind: [{"params": [], "lr": lr}, {"params": [], "lr": lr * tower_scale}] for kind, lr in kinds.items()}
    for name, parameter in module.named_parameters():
        is_table = any(part in name for part in ("embed", "lm_head", "mlp.gate.", "mlp.router.")) or name.endswith("bias")
        kind = "adamw" if is_table or parameter.ndim not in (2, 3) else "muon"
        in_tower = any(part in name for part in tower)
        groups[kind][in_tower]["params"].append(parameter)
    return [
        BatchedMuon(groups["muon"], lr=muon_lr),
        torch.optim.AdamW(groups["adamw"], lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
