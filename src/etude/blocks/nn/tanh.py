"""tanh of float32 numbers by arithmetic alone, for loops that numba compiles: vector instructions know each step of it"""

from __future__ import annotations

import numpy as np


def bend(h):
    """tanh of float32 numbers (n,) in place, within 3 units in the last place: E/(E + 2) with E = e^{2|x|} − 1.

    2|x| = k ln 2 + r with |r| ≤ ½ ln 2, and e^r − 1 by its series.
    """
    for i in range(len(h)):
        x = h[i]
        y = abs(x)
        y = np.float32(9.02) if y > np.float32(9.02) else y  # whose tanh is 1; NaN stays NaN
        y = y + y
        k = np.int32(y * np.float32(1.4426950) + np.float32(0.5))
        whole = np.float32(k)
        r = y - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)  # ln 2 in two parts
        p = np.float32(1 / 5040) * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(1 / 2)
        p = p * r * r + r
        power = np.float32(np.int32(1) << k)
        grown = power * p + (power - np.float32(1))
        y = grown / (grown + np.float32(2))
        h[i] = -y if x < 0 else y
