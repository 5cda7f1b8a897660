"""MC-MoE's skipping: NAEE's, but the tokens that matter most to later ones keep all their experts.

Which tokens those are is no matter of the routing weights, so it is told before the dispatch (``modes_fx.attach.protection``):
they come as token classes of their own, whose bound keeps all. Source: MC-MoE, arXiv 2410.06270.
"""

from __future__ import annotations

import math

from modes_fx.policies.naee import tail_at_least_share
from modes_fx.policies.rule import Rule

RULE = Rule(tail_at_least_share, keep_all=0.0, skip_all=math.inf, protects=True)
