"""Keeping the experts' load even, in each way that the architectures' makers did."""

from typing import Any

import torch
from torch import Tensor, nn

LOSS_WEIGHT = 0.02
BIAS_STEP, BIASED_LOSS_WEIGHT = 2e-3, 2e-4


class Balance:
    """Watches the routers of a model.

    A router of a softmax pays E sum_e P_e f_e (Fedus et al., Switch Transformer, equations 4-6), for each layer: the library's
    helper balances the sum of all layers, which lets one layer's neglected expert hide behind another's favourite. A layer of
    uniform load contributes 1.

    A router with a bias that corrects its choice moves that towards the neglected (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2), by a fixed step, and pays next to nothing, with sigmoids made to sum to 1 as P.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook each router: what returns (logits, weights, indices) and has top_k."""
        self._routers = [each for each in model.modules() if type(each).__name__.lower().endswith("topkrouter")]
        self._outputs: list[Any] = []
        self._hooks = [each.register_forward_hook(self._note) for each in self._routers]

    def take(self, is_real_T: Tensor) -> tuple[Tensor, float]:
        """Return the last forward's term of the loss and its mean load by layer, and move the biases.

        Args:
            is_real_T: bool [T], False on padding.
        """
        terms, loads = [], []
        for router, (logits_TE, _, chosen_TK) in zip(self._routers, self._outputs, strict=True):
            bias_E = getattr(router, "e_score_correction_bias", None)
            scores_TE = logits_TE[is_real_T].softmax(-1) if bias_E is None else _normalised(logits_TE[is_real_T].sigmoid())
            n_experts = scores_TE.shape[1]
            chosen = chosen_TK[is_real_T].flatten()
            share_E = torch.bincount(chosen, minlength=n_experts) / chosen.numel()
            uneven = n_experts * (scores_TE.mean(0) * share_E).sum()
            terms.append(uneven * (LOSS_WEIGHT if bias_E is None else BIASED_LOSS_WEIGHT))
            loads.append(n_experts * share_E.square().sum().item() if bias_E is not None else uneven.item())
            if bias_E is not None:
                bias_E.add_((1 / n_experts - share_E).sign(), alpha=BIAS_STEP)
        self._outputs.clear()
        return torch.stack(terms).sum(), sum(loads) / len(loads)

    def _note(self, router: nn.Module, _inputs: Any, outputs: Any) -> None:
        if router.training:  # evaluations in between are nobody's load
            self._outputs.append(outputs)

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


def _normalised(scores_TE: Tensor) -> Tensor:
    return scores_TE / scores_TE.sum(-1, keepdim=True)
