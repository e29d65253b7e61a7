"""What an interval decides about a claim, and how arms are paired by seed.

Every claim has a margin: the smallest effect of interest. An estimate has one of four
verdicts by its whole interval (95 %):

  equivalent   the interval lies inside threshold +- margin: any effect is smaller than
               the margin, whichever its sign (two one-sided tests);
  supported    else, the interval lies on the claim's side of the threshold;
  opposite     else, it lies on the other side;
  undecided    else, or there is no interval.

A claim with several estimates has a verdict if all of them have it, and is opposite if
one of them is; else it is undecided.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from mtp_jax.analysis import statistics
from mtp_jax.analysis.results import REPLICATE
from mtp_jax.analysis.runs import RunsError

SUPPORTED, OPPOSITE = "supported", "opposite"
EQUIVALENT, UNDECIDED = "equivalent", "undecided"

Side = Literal["above", "below", "within"]


@dataclasses.dataclass(frozen=True)
class Margin:
  """The smallest effect of interest, and its unit."""

  value: float
  unit: str

  def __str__(self) -> str:
    return f"{self.value:.3g} {self.unit}"


NATS = Margin(0.01, "nats")
BITS = Margin(0.01 / math.log(2), "bits per byte")
NATS_PER_DECADE = Margin(0.01, "nats per decade")
POINTS = Margin(0.05, "(5 points)")
TOKENS = Margin(0.1, "tokens per round")
# ln 1.3: a factor of 1.3 in time.
FACTOR = Margin(math.log(1.3), "in ln(tokens), a factor of 1.3")
FACTOR_PER_DECADE = Margin(math.log(1.3), "in ln(tokens) per decade, a factor of 1.3")


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A measured number, its interval over `n` seeds, and where it has to lie.

  side: the claim is supported if the interval lies `above` or `below` the threshold;
        `within` is a claim of no difference, which is equivalent or opposite.
  """

  label: str
  text: str
  n: int
  mean: float
  low: float
  high: float
  threshold: float = 0.0
  side: Side = "above"
  margin: float = 0.0

  @property
  def verdict(self) -> str:
    # Seeds that all give the same number, often 0, show no spread to judge by.
    if not self.high - self.low > 1e-12:
      return UNDECIDED
    low, high = self.low - self.threshold, self.high - self.threshold
    if -self.margin < low and high < self.margin:
      return EQUIVALENT
    if self.side == "within":
      is_outside = low > self.margin or high < -self.margin
      return OPPOSITE if is_outside else UNDECIDED
    if low <= 0 <= high:
      return UNDECIDED
    return SUPPORTED if (low > 0) == (self.side == "above") else OPPOSITE

  def __str__(self) -> str:
    return f"{self.label}: {self.text}" if self.label else self.text


@dataclasses.dataclass(frozen=True)
class Finding:
  """What was measured about a claim.

  note: what else to know. fixed: a verdict that replaces the one of the estimates.
  """

  estimates: tuple[Estimate, ...]
  note: str = ""
  fixed: str = ""

  @property
  def seeds(self) -> int:
    """Seeds behind the estimate that has the fewest; 0: nothing was measured."""
    return min((x.n for x in self.estimates), default=0)

  @property
  def verdict(self) -> str:
    verdicts = {x.verdict for x in self.estimates}
    if self.fixed or not verdicts:
      return self.fixed or UNDECIDED
    if OPPOSITE in verdicts:
      return OPPOSITE
    return verdicts.pop() if len(verdicts) == 1 else UNDECIDED

  @property
  def ours(self) -> str:
    """The estimates with their intervals, in words."""
    differ = len({x.verdict for x in self.estimates}) > 1
    parts = [f"{x} ({x.verdict})" if differ else str(x) for x in self.estimates]
    return "; ".join([*parts, *([self.note] if self.note else [])])

  def at(self, margin: Margin) -> "Finding":
    """Returns the finding with each estimate judged by this margin."""
    judged = (dataclasses.replace(x, margin=margin.value) for x in self.estimates)
    return dataclasses.replace(self, estimates=tuple(judged))


def undecided(finding: Finding, why: str) -> Finding:
  """Returns the finding without its verdict, and the reason."""
  note = "; ".join(x for x in (finding.note, why) if x)
  return dataclasses.replace(finding, note=note, fixed=UNDECIDED)


def share(successes: pd.Series, label: str = "") -> Estimate:
  """Returns the share of seeds that succeeded, with Wilson's interval, against 1/2."""
  n, count = len(successes), int(successes.sum())
  low, high = statistics.share(count, n)
  text = f"{count} of {n} seeds [{low:.2f}, {high:.2f}]" if n else "no seed"
  return Estimate(label, text, n, count / n if n else np.nan, low, high, 0.5)


def mean_over_seeds(
  per_seed: pd.Series,
  label: str = "",
  threshold: float = 0.0,
  side: Side = "above",
  sign: str = "+",
  level: float = statistics.LEVEL,
) -> Estimate:
  """Returns mean and t interval of one value a seed; NaN is left out, and said."""
  values = per_seed.dropna()
  over = statistics.interval(values.to_numpy(), level)
  left_out = len(per_seed) - len(values)
  more = f" ({left_out} seed(s) incomplete, left out)" if left_out else ""
  if level != statistics.LEVEL:
    more = f" ({level:.0%} interval){more}"
  return estimate(over, label, threshold, side, sign, more)


def estimate(
  over: dict[str, float],
  label: str = "",
  threshold: float = 0.0,
  side: Side = "above",
  sign: str = "+",
  more: str = "",
) -> Estimate:
  """Returns the estimate of what a function of `statistics` returned."""
  if over["n"] == 0:
    text = "no complete seed"
  elif over["n"] == 1:
    text = f"{over['mean']:{sign}.4f} (one seed: no interval)"
  else:
    text = "{mean:{s}.4f} [{low:{s}.4f}, {high:{s}.4f}]".format(s=sign, **over)
  ends = (over["mean"], over["low"], over["high"])
  return Estimate(label, text + more, int(over["n"]), *ends, threshold, side)


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
