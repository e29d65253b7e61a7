"""Statistics over seeds: intervals, equivalence, times to solve, slopes with size.

The unit is a seed, or a pair of trials of one seed: never a held-out example, which all
trials share. Every interval has the level 95 % unless another one is given.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4999
# The bootstrap's intervals are too short with fewer seeds a cell; see `contrast`.
BOOTSTRAP_SEEDS = 8


def interval(values: np.ndarray, level: float = LEVEL) -> dict[str, float]:
  """Returns n, mean and the t interval (low, high); NaN bounds for fewer than two."""
  values = np.asarray(values, float)
  n = len(values)
  if n == 0:
    return {"n": 0, "mean": np.nan, "low": np.nan, "high": np.nan}
  mean, half = values.mean(), np.nan
  if n > 1:
    half = stats.t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
  return {"n": n, "mean": mean, "low": mean - half, "high": mean + half}


def text(over: dict[str, float], sign: str = "+", digits: int = 4) -> str:
  """Returns the mean with its interval; with one seed, that there is no interval."""
  if over["n"] == 0:
    return "no complete seed"
  shown = f"{over['mean']:{sign}.{digits}f}"
  if np.isnan(over["low"]):
    return f"{shown} (one seed: no interval)"
  return f"{shown} [{over['low']:{sign}.{digits}f}, {over['high']:{sign}.{digits}f}]"


def share(count: int, n: int) -> tuple[float, float]:
  """Returns Wilson's interval of `count` successes in `n` seeds; NaN without a seed."""
  if n == 0:
    return np.nan, np.nan
  low, high = stats.binomtest(count, n).proportion_ci(LEVEL, method="wilson")
  return float(low), float(high)


def share_difference(first: tuple[int, int], second: tuple[int, int]) -> tuple:
  """Returns (difference, low, high) of two shares given as (successes, seeds).

  Newcombe 1998, method 10: the ends are made of the Wilson intervals' ends. It does not
  use that seeds are paired, and so is a little wide.
  """
  p, q = (count / n for count, n in (first, second))
  (p_low, p_high), (q_low, q_high) = share(*first), share(*second)
  below = np.hypot(p - p_low, q_high - q)
  above = np.hypot(p_high - p, q - q_low)
  return p - q, p - q - below, p - q + above


def equivalence(values: np.ndarray, margin: float) -> float:
  """Returns the p value of two one-sided t tests that the mean is within +-margin.

  It is below 0.05 exactly where the 90 % t interval lies inside +-margin.
  """
  tests = ((-margin, "greater"), (margin, "less"))
  return float(
    max(stats.ttest_1samp(values, at, alternative=side).pvalue for at, side in tests)
  )


def restricted_log_time(
  times: pd.Series, horizon: float, solved: pd.Series
) -> pd.Series:
  """Returns ln(min(time, horizon)) of each trial, whose mean is the restricted mean.

  `times` of trials that did not solve are when they ended, and must not come before the
  horizon. Then all censoring is at the horizon and the mean over trials is the area
  under the Kaplan-Meier curve of the log time: no model of the times is needed.
  """
  if (times[~solved] < horizon).any():
    raise ValueError("a trial that did not solve ended before the horizon")
  return np.log(times.clip(upper=horizon))


def kaplan_meier(times: pd.Series, solved: pd.Series) -> pd.DataFrame:
  """Returns the share solved by each time: 1 minus Kaplan-Meier's estimate."""
  data = stats.CensoredData(uncensored=times[solved], right=times[~solved])
  survival = stats.ecdf(data).sf
  return pd.DataFrame({
    "time": survival.quantiles, "share": 1 - survival.probabilities
  })


def contrast(cells: Sequence[np.ndarray], weights: np.ndarray) -> dict[str, float]:
  """Returns n, mean, low, high of `sum_c weights[c] * mean(cells[c])`.

  Seeds are resampled within each cell and the interval is BCa. Where a cell has fewer
  than `BOOTSTRAP_SEEDS` seeds the interval is Welch's (t with Satterthwaite's degrees
  of freedom), because a bootstrap of so few is too short: over four or five sizes of
  normal gains BCa covers 0.94 with ten seeds, 0.90 with five and 0.84 with three,
  Welch's 0.95. n is the fewest seeds of a cell; one seed has no interval.
  """
  cells = [np.asarray(x, float) for x in cells]
  n = min(map(len, cells))
  mean = float(sum(w * x.mean() for w, x in zip(weights, cells, strict=True)))
  variance = np.array([x.var(ddof=1) if len(x) > 1 else np.nan for x in cells])
  variance *= np.asarray(weights) ** 2 / [len(x) for x in cells]
  if not variance.sum() > 0:
    end = np.nan if n == 1 else 0.0
    return {"n": n, "mean": mean, "low": mean - end, "high": mean + end}
  if n < BOOTSTRAP_SEEDS:
    freedom = variance.sum() ** 2 / sum(
      v**2 / (len(x) - 1) for v, x in zip(variance, cells, strict=True)
    )
    half = stats.t.ppf(0.5 + LEVEL / 2, freedom) * np.sqrt(variance.sum())
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half}

  def statistic(*resampled: np.ndarray, axis: int) -> np.ndarray:
    means = (x.mean(axis=axis) for x in resampled)
    return sum(w * x for w, x in zip(weights, means, strict=True))

  return _bootstrap(cells, statistic) | {"n": n, "mean": mean}


def least_squares(design: np.ndarray, cells: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the weights [coefficients, cells] of ordinary least squares over seeds.

  Row c of `design` [cells, coefficients] belongs to every seed of cell c, so that a
  coefficient is a weighted sum of the cells' means: see `contrast`.
  """
  counts = np.array([len(x) for x in cells], float)
  weighted = design.T * counts
  return np.linalg.solve(weighted @ design, weighted)


def slope(
  sizes: Sequence[float], cells: Sequence[np.ndarray], levels: Sequence | None = None
) -> dict[str, float]:
  """Returns n, mean, low, high of the slope per decade of size; see `contrast`.

  Cells of one level (a data set, say) share an intercept; without levels all do.
  """
  return contrast(cells, slope_weights(sizes, cells, levels))


def slope_weights(
  sizes: Sequence[float], cells: Sequence[np.ndarray], levels: Sequence | None = None
) -> np.ndarray:
  """Returns the weight of every cell's mean in the slope per decade of size."""
  levels = [0] * len(cells) if levels is None else levels
  intercepts = pd.get_dummies(pd.Series(levels).astype(str), dtype=float)
  design = np.column_stack([np.log10(np.asarray(sizes, float)), intercepts])
  return least_squares(design, cells)[0]


def log_slope(sizes: Sequence[float], cells: Sequence[np.ndarray]) -> dict[str, float]:
  """Returns n, mean, low, high of the slope of log10 of the cells' means per decade.

  All means must be positive; BCa with seeds resampled within size. Below
  `BOOTSTRAP_SEEDS` seeds it is the delta method with Welch's interval.
  """
  means = np.array([np.mean(x) for x in cells])
  if not (means > 0).all():
    raise ValueError("a mean that is not positive has no logarithm")
  x = np.log10(sizes) - np.log10(sizes).mean()
  weights = x / (x @ x)
  mean = float(weights @ np.log10(means))
  n = min(map(len, cells))
  if n < BOOTSTRAP_SEEDS:
    by_delta = contrast(cells, weights / (means * np.log(10)))
    shift = mean - by_delta["mean"]
    ends = {end: by_delta[end] + shift for end in ("low", "high")}
    return {"n": n, "mean": mean} | ends

  def statistic(*resampled: np.ndarray, axis: int) -> np.ndarray:
    logs = [
      np.log10(np.maximum(own.mean(axis=axis), 1e-3 * whole))  # Never minus infinity.
      for own, whole in zip(resampled, means, strict=True)
    ]
    return sum(w * y for w, y in zip(weights, logs, strict=True))

  return _bootstrap(cells, statistic) | {"n": n, "mean": mean}


def _bootstrap(cells: Sequence[np.ndarray], statistic) -> dict[str, float]:
  """Returns the ends of the BCa interval; the same data give the same ends."""
  ends = stats.bootstrap(
    cells, statistic, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa",
    vectorized=True, rng=np.random.default_rng(0),
  ).confidence_interval
  return {"low": float(ends.low), "high": float(ends.high)}
