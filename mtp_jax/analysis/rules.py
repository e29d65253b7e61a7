"""The statistics of a claim: estimates with intervals, and what they decide.

An estimate decides by its whole interval (95 %): it lies on the right side of the
threshold, on the wrong side, or on both. A claim with several estimates holds if all of
them do, and fails if one does; else it is not decided.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from mtp_jax.analysis.gains import LEVEL, interval
from mtp_jax.analysis.results import REPLICATE
from mtp_jax.analysis.runs import RunsError


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A measured number, its interval over `n` seeds, and where it has to lie.

  side: the claim holds if the interval lies `above` or `below` the threshold, or, for
        `around`, if it contains it.
  """

  label: str
  text: str
  n: int
  mean: float
  low: float
  high: float
  threshold: float = 0.0
  side: Literal["above", "below", "around"] = "above"

  @property
  def holds(self) -> bool | None:
    """True, False, or None where the interval does not decide (or is missing)."""
    if np.isnan(self.low):
      return None
    is_above = bool(self.low > self.threshold)
    is_below = bool(self.high < self.threshold)
    if self.side == "around":
      return not (is_above or is_below)
    if not (is_above or is_below):
      return None
    return is_above == (self.side == "above")

  def __str__(self) -> str:
    return f"{self.label}: {self.text}" if self.label else self.text


@dataclasses.dataclass(frozen=True)
class Finding:
  """What was measured about a claim.

  holds: None where the estimates do not decide. note: why, or what else to know.
  """

  estimates: tuple[Estimate, ...]
  holds: bool | None
  note: str = ""

  @property
  def seeds(self) -> int:
    """Seeds behind the estimate that has the fewest; 0: nothing was measured."""
    return min((x.n for x in self.estimates), default=0)

  @property
  def ours(self) -> str:
    """The estimates with their intervals, in words."""
    return "; ".join([*map(str, self.estimates), *([self.note] if self.note else [])])


def decide(estimates: Sequence[Estimate], note: str = "") -> Finding:
  """Returns the finding of estimates that must all hold."""
  outcomes = [x.holds for x in estimates]
  if False in outcomes:
    return Finding(tuple(estimates), False, note)
  holds = bool(outcomes) and all(outcomes)
  return Finding(tuple(estimates), holds or None, note)


def undecided(finding: Finding, why: str) -> Finding:
  """Returns the finding without its decision, and says why."""
  return dataclasses.replace(finding, holds=None, note=why)


def share(successes: pd.Series, label: str = "") -> Estimate:
  """Returns the share of seeds that succeeded, with Wilson's interval, against 1/2."""
  n, count = len(successes), int(successes.sum())
  if n == 0:
    return Estimate(label, "no seed", 0, np.nan, np.nan, np.nan, 0.5)
  low, high = stats.binomtest(count, n).proportion_ci(LEVEL, method="wilson")
  text = f"{count} of {n} seeds [{low:.2f}, {high:.2f}]"
  return Estimate(label, text, n, count / n, low, high, 0.5)


def mean_over_seeds(
  per_seed: pd.Series,
  label: str = "",
  threshold: float = 0.0,
  side: Literal["above", "below", "around"] = "above",
  sign: str = "+",
) -> Estimate:
  """Returns mean and t interval of one value a seed; NaN is left out, and said."""
  values = per_seed.dropna()
  over = interval(values.to_numpy())
  if over["n"] == 0:
    text = "no complete seed"
  elif over["n"] == 1:
    text = f"{over['mean']:{sign}.4f} (one seed: no interval)"
  else:
    text = "{mean:{s}.4f} [{low:{s}.4f}, {high:{s}.4f}]".format(s=sign, **over)
  if len(values) < len(per_seed):
    text += f" ({len(per_seed) - len(values)} seed(s) incomplete, left out)"
  return Estimate(
    label, text, over["n"], over["mean"], over["low"], over["high"], threshold, side
  )


def paired(
  first: pd.DataFrame, second: pd.DataFrame, within: Sequence[str] = ()
) -> pd.Series:
  """Returns first minus second, one value a seed, from rows with column `value`.

  Rows are paired by seed and by the columns `within`, over which the differences are
  averaged. A seed that lacks a pair that others have is NaN; a combination of `within`
  that no seed has on both sides does not count.

  Raises:
    RunsError: two trials are the same in all of these.
  """
  keys = [*REPLICATE, *within]
  difference = by_key(first, keys) - by_key(second, keys)
  if not within:
    return difference
  table = difference.unstack(list(within)).dropna(axis="columns", how="all")
  if table.empty:
    return pd.Series(dtype=float)
  return table.mean(axis="columns", skipna=False)


def by_key(rows: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
  """Returns `value` indexed by the keys, which must tell the trials apart.

  Raises:
    RunsError: they do not; names two trials.
  """
  twice = rows[rows.duplicated(list(keys), keep=False)]
  if len(twice):
    names = " and ".join(twice["trial"].iloc[:2])
    raise RunsError(
      f"trials {names} have the same {', '.join(keys)}: a claim cannot tell which of "
      f"them to take."
    )
  return rows.set_index(list(keys))["value"]
