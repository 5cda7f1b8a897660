"""Reading numbers out of pickles without running what else they may hold.

A pickle is a program that may call any function it names. Here it may name the containers and arrays below and nothing else: a
file that names more is refused before that is called. ``torch.save``'s files go through torch's own restricted reader
(``weights_only=True``), plain pickles through Python's, with names looked up in the same list.
"""

from __future__ import annotations

import codecs
import collections
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from modes_fx.errors import PlanError

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip files
_MOST_NUMBERS = 1 << 20  # an expanded tensor of few bytes may claim any number


def _numpy_names() -> dict[str, Any]:
    """Return what pickles of NumPy's numbers and arrays name; NumPy 1 and 2 spell the module of its C code differently."""
    names: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for number in (np.zeros(1), np.float64(0)):
        rebuild: Any = number.__reduce__()[0]
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            names[f"{module}.{rebuild.__name__}"] = rebuild
    for kind in "?bBhHiIlLqQefd":
        of_kind = type(np.dtype(kind))
        names[f"{of_kind.__module__}.{of_kind.__name__}"] = of_kind
    return names


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": codecs.encode,  # how Python 2's protocols spell bytes
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, float, int)},
    **_numpy_names(),
}


def load_numbers(path: str | os.PathLike[str]) -> Any:
    """Return what a ``torch.save`` or pickle file holds, its tensors and arrays as lists, as far as that is plain data.

    Args:
        path: The file.

    Returns:
        Dicts, lists and tuples of numbers, strings and None.

    Raises:
        PlanError: The file is unreadable, or holds anything else; nothing of it was run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _plain(_read(file))
    except OSError as error:
        raise PlanError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle raises anything; whatever it is, the file is of no use
        said = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error).strip()  # torch wraps it in advice
        name = re.search(r"GLOBAL (\S+)", said)
        first = said.splitlines()[0] if said else type(error).__name__
        what = f"it names {name[1]}, which is no number or container" if name else first.rstrip(".")
        raise PlanError(
            f"{path} is refused: {what}. Expected torch.save or pickle of numbers, tensors or arrays in lists and dicts; "
            "nothing in the file was run."
        ) from error


def _read(file: IO[bytes]) -> Any:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        content = _PlainUnpickler(file).load()
        if not isinstance(content, int) or content != _TORCH_MAGIC:
            return content
    file.seek(0)
    with torch.serialization.safe_globals([(found, name) for name, found in _ALLOWED.items()]):
        return torch.load(file, map_location="cpu", weights_only=True)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {full}")
        return _ALLOWED[full]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) > _MOST_NUMBERS:
        raise pickle.UnpicklingError(f"it holds {math.prod(value.shape)} numbers in one, more than {_MOST_NUMBERS}")
    if isinstance(value, Tensor):
        return _plain(value.detach().to_dense().tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__module__}.{type(value).__name__}, which is no number or container")
