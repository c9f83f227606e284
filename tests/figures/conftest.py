"""Figures are looked at in matplotlib's own style, whatever a test before them asked for."""

from collections.abc import Iterator

import matplotlib
import pytest


@pytest.fixture(autouse=True)
def plain_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield
