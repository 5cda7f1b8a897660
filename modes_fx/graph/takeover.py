"""Take a module's call over through its class, where every caller and every tracer comes by.

A subclass made for the module's class overrides ``__call__`` alone. Unlike a hook it is traced in line; unlike a replaced
``forward`` it stands in front of whatever else replaces that (accelerate, ``model.forward = torch.compile(model.forward)``);
and copies and pickles are of the module's own class, so that they are stock.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from modes_fx.graph.code import own_code

Call = Callable[..., Any]
_ATTRIBUTE = "_modes_fx_takeover"


class Takeover:
    """What runs in the place of a module's call. Of several, the last one made is the first to run.

    Args:
        module: The module; its class is changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._inner: Takeover | None = vars(module).get(_ATTRIBUTE)
        vars(module)[_ATTRIBUTE] = self
        for name in ("run", "call"):  # each module comes through these
            setattr(self, name, types.MethodType(own_code(getattr(type(self), name)), self))
        self._before: Any = type(module)
        if self._inner is None:
            module.__class__ = _taken_over(self._before)

    def call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for ``call(*args, **kwargs)``, the module's own call."""
        raise NotImplementedError

    def remove(self) -> None:
        """Give the module its call back; of several on one module the last one made goes first."""
        if self._inner is not None:
            vars(self.module)[_ATTRIBUTE] = self._inner
            return
        del vars(self.module)[_ATTRIBUTE]
        self.module.__class__ = self._before

    def run(self, stock: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run this one, and what it asks for of the inner ones."""
        inner = self._inner
        if inner is None:
            return self.call(stock, args, kwargs)

        def call(*given: Any, **named: Any) -> Any:
            return inner.run(stock, given, named)

        return self.call(call, args, kwargs)


def _taken_over(stock: Any) -> Any:
    """Return a subclass whose instances' calls are taken over; to whoever asks by name it is the class itself."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # `torch.compile(module)` holds this method for good, so it is called after a removal and after another takeover, too.
        def own(*given: Any, **named: Any) -> Any:
            return stock.__call__(self, *given, **named)

        takeover = getattr(self, _ATTRIBUTE, None)
        return own(*args, **kwargs) if takeover is None else takeover.run(own, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__getstate__().items() if name != _ATTRIBUTE}
        return copyreg._reconstructor, (stock, object, None), state  # type: ignore[attr-defined]  # as of old protocols

    named = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    subclass: Any = type(stock.__name__, (stock,), {**named, "__call__": own_code(__call__), "__reduce_ex__": __reduce_ex__})
    return subclass
