"""What the tests of one graph share."""

from collections.abc import Iterator

import pytest

from modes_fx.policies import RULES
from modes_fx.policies.registry import _KEYS


@pytest.fixture
def rules() -> Iterator[None]:
    """Forget the rules that a test registers."""
    before, keys = dict(RULES), dict(_KEYS)
    yield
    for known, was in ((RULES, before), (_KEYS, keys)):
        known.clear()
        known.update(was)
