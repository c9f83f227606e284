"""How well one colour can be told from another."""

from collections.abc import Sequence

import numpy as np


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """How much lighter one colour is than the other, as WCAG counts it: from 1 to 21.

    Channels are red, green and blue, 0 to 255.
    """
    shares = np.array([one, other]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return float((high + 0.05) / (low + 0.05))
