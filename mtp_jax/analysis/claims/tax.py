"""The tax: what extra losses cost in next-token loss on text, by size and by data.

The tax of an arm is its held-out main loss minus NTP's, of one size, amount of text and
seed. `fresh` is the most text that was trained on, `repeated` the least: the same
number of steps over fewer documents, so that they come again.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from mtp_jax.analysis import drawing, statistics
from mtp_jax.analysis.claims import arms, by_size, claim
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE, Results, Where

TEXT = "data.test_fraction"  # The share of documents that is not trained on.
WEIGHT = "mtp.weight"
ARMS = {
  "n2": ({**arms.parallel(2), WEIGHT: 1.0}, "parallel n = 2, weight 1"),
  "n4": ({**arms.parallel(4), WEIGHT: 1.0}, "parallel n = 4, weight 1"),
  "d1": ({**arms.sequential(1), WEIGHT: 0.3}, "sequential D = 1, weight 0.3"),
}


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "tax", preset, "The tax: what extra losses cost, by size",
    "Main loss minus NTP's in nats per token, mean and 95 % t interval over seeds; "
    "hollow: the text that is repeated most.",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[claim.Claim]:
  def own(key, statement, source, published, rule, test, *how, margin=claim.NATS):
    return claim.Claim(
      key, statement, source, published, rule, margin,
      lambda results: test(results, *how),
    )

  for arm in ("n2", "n4"):
    words = ARMS[arm][1]
    yield own(
      f"{arm}_costs", f"Fresh text: {words} costs next-token loss",
      f"{claim.TOP}, table 2",
      "log LAMBADA perplexity, parallel n = 4 minus NTP, 340M / 1.8B / 7B: +0.15 / "
      "+0.19 / +0.12",
      "tax paired by seed, t interval over seeds, above 0 at every size", costs, arm,
    )
    yield own(
      f"{arm}_falls", f"Fresh text: the tax of {words} falls with size",
      f"{claim.GLOECKLE}, table S7; {claim.TOP}, table 2",
      "no ladder of losses below 340M; log LAMBADA perplexity of sequential D = 3, "
      "340M / 1.8B / 7B: +0.30 / +0.16 / +0.07",
      "slope of log10 of the mean tax on log10 parameters, seeds resampled within size "
      "(BCa), below 0; undecided where the tax of a size is not above 0", falls, arm,
      margin=claim.Margin(np.log10(1.3), "in log10 per decade, a factor of 1.3"),
    )
    for moment, at in (("last", "at the last step"), ("best", "at the best step")):
      yield own(
        f"{arm}_repeated_{moment}",
        f"Repeated text: {words} gains next-token loss {at}",
        "own pilot of one seed", "nothing",
        f"tax on the least text {at}, averaged over sizes with seeds resampled within "
        "size (BCa), below 0", repeated_gains, arm, moment,
      )
    yield own(
      f"{arm}_regimes", f"Repetition lowers the tax of {words}",
      f"{claim.GLOECKLE}, table 1, found the opposite for pass rates",
      "nothing on losses",
      "tax on the least text minus on the most, paired by seed, averaged over sizes "
      "within a seed, t interval over seeds, below 0", regimes, arm,
    )
  yield own(
    "d1_nil", "Fresh text: the tax of one sequential module of weight 0.3 is nil",
    f"{claim.DEEPSEEK}, table 4",
    "bits per byte on the Pile, D = 1 minus NTP: 0.000 at 15.7B, -0.001 at 228.7B",
    "tax at every size, paired by seed: two one-sided t tests at 5 %, so that the 90 % "
    "interval lies within the margin", d1_is_nil,
  )


def taxes(results: Results, arm: str, moment: str = "last") -> pd.DataFrame:
  """Returns the paired taxes: columns size, text, REPLICATE and gain (the tax).

  Of the final evaluation, or for `best` of the test record at the step that is best on
  validation.
  """
  keys = ["size", results.key(TEXT)]
  # Arm `flops`, the longer NTP runs, has no part in this.
  added = {"mtp.arm": "added"} if "mtp.arm" in results.trials else {}

  def of(where: Where) -> pd.DataFrame:
    rows = results.measured("main_loss", where | added)
    if moment == "best":
      best = arms.at_moment(results, "loss", "best", "min")
      rows = rows.assign(value=rows["trial"].map(best).astype(float))
    return arms.reported(rows.dropna(subset="value"), keys)

  pairs = arms.pairs(of(arms.NTP), of(ARMS[arm][0]), keys, sign=-1)
  return pairs.rename(columns={TEXT: "text"})


def fresh(rows: pd.DataFrame) -> pd.DataFrame:
  """Returns the taxes on the most text."""
  return rows[rows["text"] == rows["text"].min()]


def repeated(rows: pd.DataFrame) -> pd.DataFrame:
  """Returns the taxes on the least text; none if there is one amount of text."""
  is_most = rows["text"] == rows["text"].max()
  return rows[is_most & (rows["text"] > rows["text"].min())]


def costs(results: Results, arm: str) -> claim.Finding:
  """Tests whether the arm loses to NTP on fresh text, at every size."""
  return by_size.each_size(fresh(taxes(results, arm)))


def falls(results: Results, arm: str) -> claim.Finding:
  """Tests the slope of the log tax with size on fresh text."""
  index, own = by_size.cells(fresh(taxes(results, arm)))
  if len(own) < 2:
    return claim.Finding()
  over = [statistics.interval(tax) for tax in own]
  # A logarithm needs means above 0; the slope of the tax itself does not.
  is_positive = all(x["mean"] > 0 for x in over)
  fit = statistics.log_slope if is_positive else statistics.slope
  label = "log10 tax per decade" if is_positive else "of the tax itself, per decade"
  slope = claim.estimate(fit(index["size"], own), label, side="below")
  finding = claim.Finding((slope,))
  flat = [
    size_text(size) for size, x in zip(index["size"], over, strict=True)
    if not x["low"] > 0
  ]
  if flat:
    return finding.undecided(f"the tax is not above 0 at {', '.join(flat)}")
  return finding


def repeated_gains(results: Results, arm: str, moment: str) -> claim.Finding:
  """Tests whether the tax is a gain where the text is repeated most."""
  rows = repeated(taxes(results, arm, moment))
  return by_size.average(rows, "mean tax", side="below")


def regimes(results: Results, arm: str) -> claim.Finding:
  """Tests whether the tax is lower where the text is repeated most."""
  rows = taxes(results, arm)
  most, least = (
    part(rows).set_index(["size", *REPLICATE])["gain"] for part in (repeated, fresh)
  )
  return claim.found((most - least).dropna(), "repeated minus fresh", side="below")


def d1_is_nil(results: Results) -> claim.Finding:
  """Tests whether D = 1 at weight 0.3 costs nothing on fresh text, at every size."""
  rows = fresh(taxes(results, "d1"))
  index, own = by_size.cells(rows)
  p = [
    f"{size_text(size)} {statistics.equivalence(tax, claim.NATS.value):.3f}"
    for size, tax in zip(index["size"], own, strict=True) if len(tax) > 1
  ]
  finding = by_size.each_size(rows, side="within", level=0.9)
  note = f"p of the two tests: {', '.join(p)}" if p else ""
  return claim.Finding(finding.estimates, note)


def table(results: Results) -> pd.DataFrame:
  """Returns the tax of every arm, amount of text and size, with its verdict."""
  return pd.DataFrame([
    row
    for arm, (_, words) in ARMS.items()
    for text, own in taxes(results, arm).groupby("text")
    for row in by_size.rows(own, {"method": words, "held out": text}, claim.NATS)
  ])


def draw(results: Results) -> claim.Drawing:
  """Draws the tax of every arm against size."""
  figure, axes = drawing.panels(1, 1, width=6.5, height=5.0)
  ylabel = "main loss minus NTP's,\nnats per token"
  table = by_size.draw(axes[0, 0], *series(results), ylabel)
  drawing.legend_below(figure, axes.flat)
  return figure, table


def series(results: Results) -> by_size.Series:
  """Returns the taxes with the line that shows each, and the look of the lines."""
  parts, styles = [], {}
  for index, (arm, (_, words)) in enumerate(ARMS.items(), start=1):
    rows = taxes(results, arm)
    for regime, part in (("fresh", fresh), ("repeated", repeated)):
      name = f"{words}, {regime}"
      styles[name] = drawing.series_style(index, is_hollow=regime == "repeated")
      parts.append(part(rows).assign(series=name))
  return pd.concat(parts), styles


def prediction(sizes: np.ndarray, taxes: np.ndarray, at: np.ndarray) -> pd.DataFrame:
  """Returns the power law of the mean tax at sizes `at`, with 95 % prediction interval.

  Least squares of log10 tax on log10 size; the interval is for the mean tax of one more
  size and widens away from the ladder. Needs three sizes and positive taxes.
  """
  x, y, new = np.log10(sizes), np.log10(taxes), np.log10(at)
  fit = stats.linregress(x, y)
  middle = fit.intercept + fit.slope * new
  freedom = len(x) - 2
  scale = np.sqrt(((y - fit.intercept - fit.slope * x) ** 2).sum() / freedom)
  spread = 1 + 1 / len(x) + (new - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
  half = stats.t.ppf(0.975, freedom) * scale * np.sqrt(spread)
  return pd.DataFrame({
    "size": at, "mean": 10**middle, "low": 10 ** (middle - half),
    "high": 10 ** (middle + half),
  })
