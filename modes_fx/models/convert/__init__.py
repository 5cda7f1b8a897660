"""Blocks whose experts never reach transformers' dispatch: recognised by their structure, run through it all the same.

Each file here knows one form. It makes a *stand-in*: a shallow copy of the block in which one thing is replaced, so that
the block's own code (its router, its shared experts) goes on deciding everything else. Forms are tried in order.
"""

from __future__ import annotations

from torch import nn

from modes_fx.models.convert import dbrx, jetmoe, llama4, longcat_flash, moe_infer, refused, softmax_loop, stacked
from modes_fx.models.convert.form import Form

FORMS: tuple[Form, ...] = (
    moe_infer.FORM,
    softmax_loop.FORM,
    dbrx.FORM,
    longcat_flash.FORM,
    jetmoe.FORM,
    llama4.FORM,
    *refused.NAMED,
    stacked.FORM,
    refused.UNKNOWN,
)


def convertible(block: nn.Module) -> tuple[Form, str] | None:
    """Return the form of a block that keeps its experts out of reach, and the attribute that holds them; None for others.

    A form may still refuse the block, with a reason, when it comes to converting it.
    """
    for form in FORMS:
        attribute = form.experts_in(block)
        if attribute is not None:
            return form, attribute
    return None


__all__ = ["FORMS", "Form", "convertible"]
