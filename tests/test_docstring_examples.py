"""The examples in docstrings of the central types are true."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from rayrlhf import batch, prefixes, samples
from rayrlhf.algorithms import metrics


@pytest.mark.parametrize("module", [samples, batch, prefixes, metrics], ids=lambda module: module.__name__)
def test_they_are_true(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
