"""Write a keep-rule of your own: it is traced into the graph like the package's, and really skips.

The rule here keeps a token's experts from the largest down until they hold a given share of its weight, and never the one
expert that you forbid. It shows all that a rule may use: weights, bounds, expert ids and a table for each layer.

python examples/custom_policy.py
"""

import math

import torch
from torch import Tensor

import modes_fx
from modes_fx.calib import Objective
from modes_fx.demo import collate, load, make_samples
from modes_fx.plan import PlanPoint
from modes_fx.policies import Rule, register


def top_share(weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_E: Tensor) -> Tensor:
    """Keep what is needed to hold 1 - bound of a token's weight; ``table_E`` is 0 for an expert that is never kept.

    Tensor operations alone, no ``if`` on their values: the function is traced. ``weights_TK`` is float32 whatever the model's
    dtype; minus infinity marks a pair without an expert.
    """
    larger_TKK = weights_TK.unsqueeze(1) > weights_TK.unsqueeze(2)
    held_TK = torch.where(larger_TKK, weights_TK.clamp(min=0).unsqueeze(1), 0.0).sum(dim=2)  # by those in front of each
    wanted_TK = (1 - bound_T.unsqueeze(1)) * weights_TK.clamp(min=0).sum(dim=1, keepdim=True)
    allowed = (table_E[expert_ids_TK] > 0) | (bound_T.unsqueeze(1) == 0)
    return ((held_TK < wanted_TK) | (bound_T.unsqueeze(1) == 0)) & allowed & (weights_TK > -math.inf)


def main() -> None:
    """Register the rule, make plans that name it, and measure them."""
    register("top_share", Rule(top_share, keep_all=0.0, skip_all=math.inf))
    model, processor = load(torch.float32)
    batches = [collate(make_samples("test", n_images=4), processor)]
    layers = len(modes_fx.report(modes_fx.optimize(model)).sites)
    experts = model.config.text_config.num_experts
    tables = tuple((0.0, *[1.0] * (experts - 1)) for _ in range(layers))  # expert 0 is never kept

    def plan(text: float, vision: float) -> modes_fx.SkipPlan:
        return modes_fx.SkipPlan((PlanPoint(None, text, vision),), rule="top_share", tables=tables)

    modes_fx.optimize(model, plan(0.5, 0.8))
    objective = Objective(model, batches)
    for text, vision in ((0.0, 0.0), (0.3, 0.6), (0.5, 0.8)):
        found = objective.evaluate(plan(text, vision).bounds(layers))  # new bounds: nothing is compiled again
        print(
            f"bounds {text:g}, {vision:g}: {found.skip_ratio:.1%} skipped, KL {found.kl:.2e} nats, {found.accuracy:.1%} right"
        )
    print(modes_fx.report(model))
    modes_fx.restore(model)


if __name__ == "__main__":
    main()
