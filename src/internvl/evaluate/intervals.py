"""A mean and how sure it is: Wilson for shares, bootstrap for other means. What is averaged is the callers'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % score interval of the share hits / n (Wilson 1927); never leaves [0, 1], unlike the normal one."""
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n}: n must be positive and the hits between 0 and n")
    share, spread = hits / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, or of sum(values) / sum(weights), over resampled rows."""
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn = generator.integers(0, len(numerators), len(numerators))
        means[i] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with the interval that fits: Wilson where every value is 0 or 1, bootstrap elsewhere."""
    if not values:
        raise ValueError("no values to average; the set is empty")
    mean = sum(values) / len(values)
    low, high = wilson(sum(values), len(values)) if set(values) <= {0.0, 1.0} else bootstrap(values)
    return Estimate(mean, low, high, len(values))


def estimate_ratio(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Sum of values over sum of weights (loss per token of rows of unlike length), rows resampled."""
    if not values or sum(weights) <= 0:
        raise ValueError(f"{len(values)} values with weights that add up to {sum(weights)}; both must be positive")
    low, high = bootstrap(values, weights)
    return Estimate(sum(values) / sum(weights), low, high, len(values))
