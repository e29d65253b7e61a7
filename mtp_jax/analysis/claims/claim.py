"""Claims, and the verdict on a claim that follows from an interval over seeds.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis import statistics
from mtp_jax.analysis.results import REPLICATE

SUPPORTED, OPPOSITE = "supported", "opposite"
EQUIVALENT, UNDECIDED = "equivalent", "undecided"
NOT_TESTED, NOT_RUN = "not tested (design)", "not yet run"

NO_FIGURE = "no figure that we could check"
OWN = "our own question"
GLOECKLE = "Gloeckle et al. 2024, arXiv 2404.19737"
TOP = "TOP, arXiv 2508.19228"
DEEPSEEK = "DeepSeek-V3, arXiv 2412.19437"
AYNETDINOV = "Aynetdinov and Akbik 2025, arXiv 2505.22757"
PAIRED = "paired by seed, t interval over seeds, above 0"

Side = Literal["above", "below", "within"]
Drawing = tuple[Figure, pd.DataFrame]


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

  estimates: tuple[Estimate, ...] = ()
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

  def undecided(self, why: str) -> "Finding":
    """Returns the finding without its verdict, and the reason."""
    note = "; ".join(x for x in (self.note, why) if x)
    return dataclasses.replace(self, note=note, fixed=UNDECIDED)


def estimate(
  over: dict[str, float], label: str = "", threshold: float = 0.0,
  side: Side = "above", sign: str = "+", more: str = "",
) -> Estimate:
  """Returns the estimate of what a function of `statistics` returned."""
  ends = (over["mean"], over["low"], over["high"])
  text = statistics.text(over, sign) + more
  return Estimate(label, text, int(over["n"]), *ends, threshold, side)


def over_seeds(
  values: pd.Series, label: str = "", level: float = statistics.LEVEL, **how: Any
) -> Estimate:
  """Returns mean and t interval over seeds of values indexed by REPLICATE.

  Further levels of the index (widths, texts) are averaged within a seed. A seed that
  lacks a combination of them that other seeds have is left out, and counted in the
  text; a combination that no seed has does not count. how: of `estimate`.
  """
  further = [name for name in values.index.names if name not in REPLICATE]
  if further:
    table = values.unstack(further).dropna(axis="columns", how="all")
    values = table.mean(axis="columns", skipna=False) if table.size else values[:0]
  complete = values.dropna()
  left_out = len(values) - len(complete)
  more = f" ({left_out} seed(s) incomplete, left out)" if left_out else ""
  if level != statistics.LEVEL:
    more = f" ({level:.0%} interval){more}"
  over = statistics.interval(complete.to_numpy(), level)
  return estimate(over, label, more=more, **how)


def found(values: pd.Series, label: str = "", note: str = "", **how: Any) -> Finding:
  """Returns the finding with one estimate; see `over_seeds`."""
  return Finding((over_seeds(values, label, **how),), note)


def share(successes: pd.Series, label: str = "") -> Estimate:
  """Returns the share of seeds that succeeded, with Wilson's interval, against 1/2."""
  n, count = len(successes), int(successes.sum())
  low, high = statistics.share(count, n)
  text = f"{count} of {n} seeds [{low:.2f}, {high:.2f}]" if n else "no seed"
  return Estimate(label, text, n, count / n if n else np.nan, low, high, 0.5)


@dataclasses.dataclass(frozen=True)
class Claim:
  """One sentence that results can contradict.

  key:        unique within the experiment.
  published:  the published figure, or that there is none.
  rule:       in words, what `test` computes and where its interval must lie.
  not_tested: why the experiment, as it was run, cannot test the claim; else empty.
  """

  key: str
  statement: str
  source: str
  published: str
  rule: str
  margin: Margin
  test: Callable[[Any], Finding]
  not_tested: str = ""

  def judge(self, results: Any) -> Finding:
    """Returns what the results show, each estimate judged by the claim's margin."""
    return self.test(results).at(self.margin)

  def verdict(self, finding: Finding | None) -> str:
    """Returns the verdict on what was found; None is an experiment without results."""
    if finding is None or finding.seeds == 0:
      return NOT_RUN
    return NOT_TESTED if self.not_tested else finding.verdict


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The claims that one preset of an experiment decides.

  read: reads its results folder. draw: returns its figure and the numbers in it; None
  draws the estimates of the claims. table: returns what the page also shows as a table,
  if anything. beside: the folder of another experiment whose results, if there are any,
  draw and table read too.
  """

  name: str
  preset: str
  title: str
  caption: str
  claims: tuple[Claim, ...]
  draw: Callable[..., Drawing] | None = None
  read: Callable[[Path], Any] = results_lib.read
  table: Callable[..., pd.DataFrame] | None = None
  beside: str = ""

  @property
  def folder(self) -> str:
    return f"{self.name}_{self.preset}"

  @property
  def command(self) -> str:
    """The command that runs it; results carry the command that did."""
    return (
      f"python -m launch.sweep --config=experiments/{self.name}.py:{self.preset} "
      f"--workdir=runs/{self.folder}"
    )
