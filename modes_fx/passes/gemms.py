"""The grouped GEMMs of a site, whose rows are sorted by expert, and what they take."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from modes_fx.passes.emit import Emitter
from modes_fx.passes.rowwise import GROUPED
from modes_fx.passes.site import RoutingSite
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import argument, input_of, is_method


def gemms_of(node: dict[str, fx.Node], site: RoutingSite) -> list[fx.Node]:
    """Return a site's grouped GEMMs in graph order, from the graph's nodes by name."""
    return [node[name] for name in site.body if getattr(node[name].target, "__name__", "") in GROUPED]


def stored_weight(gemm: fx.Node) -> fx.Node:
    """Return the weight of a GEMM as it is stored, [E, N, D] or [E, D, N]."""
    right = input_of(gemm, 1)
    return input_of(right) if _is_transpose(right) else right


def is_row_major(gemm: fx.Node) -> bool:
    """Return whether the weight of a GEMM lies along its inner dimension D in memory."""
    stored = stored_weight(gemm)
    inner = 1 if stored is input_of(gemm, 1) else 2
    return bool(value_of(stored).stride(inner) == 1)


def weight_of(gemm: fx.Node) -> fx.Node:
    """Return the weight [E, N, D] of a GEMM; one that is stored otherwise gets a view in front of the GEMM."""
    stored = stored_weight(gemm)
    return Emitter(before=gemm).trace(_transpose, stored)[0] if stored is input_of(gemm, 1) else stored


def feeds_only(node: fx.Node, gemms: Collection[fx.Node]) -> bool:
    """Return whether nothing but GEMMs sees a node's value, or changes it, also through conversions that change nothing."""
    return all(user in gemms or (uncast(user) is not user and feeds_only(user, gemms)) for user in node.users)


def multiplied_last(weighted: fx.Node, gemms: Collection[fx.Node]) -> fx.Node | None:
    """Return the GEMM whose rows the routing weights multiply, where nothing comes between; else None."""
    return next((item for item in weighted.all_input_nodes if item in gemms and set(item.users) == {weighted}), None)


def uncast(node: fx.Node) -> fx.Node:
    """Look through conversions to the dtype that a node has."""
    while is_method(node, "to") and value_of(input_of(node)).dtype == value_of(node).dtype:
        node = input_of(node)
    return node


def _is_transpose(node: fx.Node) -> bool:
    return is_method(node, "transpose") and {argument(node, 1, "dim0") % 3, argument(node, 2, "dim1") % 3} == {1, 2}


def _transpose(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)
