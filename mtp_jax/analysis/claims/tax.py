"""The tax: what extra losses cost in next-token loss on text, by size and by data.

The tax of an arm is its held-out main loss minus NTP's, of one size, amount of text and
seed. `fresh` is the most text that was trained on, `repeated` the least: the same
number of steps over fewer documents, so that they come again.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import arms
from mtp_jax.analysis.claims.arms import at_moment, reported
from mtp_jax.analysis.claims.claim import (
  DEEPSEEK,
  GLOECKLE,
  TOP,
  Claim,
  Drawing,
  Experiment,
)
from mtp_jax.analysis.drawing import (
  error_bars,
  legend_below,
  panels,
  series_style,
  size_axis,
  zero_line,
)
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE, Results
from mtp_jax.analysis.rules import (
  NATS,
  Finding,
  Margin,
  by_key,
  estimate,
  mean_over_seeds,
  undecided,
)

TEXT = "data.test_fraction"  # The share of documents that is not trained on.
WEIGHT = "mtp.weight"
ARMS = {
  "n2": ({**arms.parallel(2), WEIGHT: 1.0}, "parallel n = 2, weight 1"),
  "n4": ({**arms.parallel(4), WEIGHT: 1.0}, "parallel n = 4, weight 1"),
  "d1": ({**arms.sequential(1), WEIGHT: 0.3}, "sequential D = 1, weight 0.3"),
}


def experiment(preset: str) -> Experiment:
  return Experiment(
    "tax", preset, "The tax: what extra losses cost, by size",
    "Main loss minus NTP's in nats per token, mean and 95 % t interval over seeds; "
    "hollow: the text that is repeated most.",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[Claim]:
  for arm in ("n2", "n4"):
    words = ARMS[arm][1]
    yield Claim(
      f"{arm}_costs", f"Fresh text: {words} costs next-token loss",
      f"{TOP}, table 2", "log LAMBADA perplexity, parallel n = 4 minus NTP, 340M / "
      "1.8B / 7B: +0.15 / +0.19 / +0.12",
      "tax paired by seed, t interval over seeds, above 0 at every size",
      NATS, functools.partial(costs, arm=arm),
    )
    yield Claim(
      f"{arm}_falls", f"Fresh text: the tax of {words} falls with size",
      f"{GLOECKLE}, table S7; {TOP}, table 2",
      "no ladder of losses below 340M; log LAMBADA perplexity of sequential D = 3, "
      "340M / 1.8B / 7B: +0.30 / +0.16 / +0.07",
      "slope of log10 of the mean tax on log10 parameters, seeds resampled within size "
      "(BCa), below 0; undecided where the tax of a size is not above 0",
      Margin(np.log10(1.3), "in log10 per decade, a factor of 1.3"),
      functools.partial(falls, arm=arm),
    )
    for moment, at in (("last", "at the last step"), ("best", "at the best step")):
      yield Claim(
        f"{arm}_repeated_{moment}",
        f"Repeated text: {words} gains next-token loss {at}",
        "own pilot of one seed", "nothing",
        f"tax on the least text {at}, averaged over sizes with seeds resampled within "
        "size (BCa), below 0",
        NATS, functools.partial(repeated_gains, arm=arm, moment=moment),
      )
    yield Claim(
      f"{arm}_regimes", f"Repetition lowers the tax of {words}",
      f"{GLOECKLE}, table 1, found the opposite for pass rates", "nothing on losses",
      "tax on the least text minus on the most, paired by seed, averaged over sizes "
      "within a seed, t interval over seeds, below 0",
      NATS, functools.partial(regimes, arm=arm),
    )
  yield Claim(
    "d1_nil", "Fresh text: the tax of one sequential module of weight 0.3 is nil",
    f"{DEEPSEEK}, table 4", "bits per byte on the Pile, D = 1 minus NTP: 0.000 at "
    "15.7B, -0.001 at 228.7B",
    "tax at every size, paired by seed: two one-sided t tests at 5 %, so that the 90 % "
    "interval lies within the margin",
    NATS, d1_is_nil,
  )


def taxes(results: Results, arm: str, moment: str = "last") -> pd.DataFrame:
  """Returns the paired taxes: columns size, text, seed and tax.

  Of the final evaluation, or for `best` of the test record at the step that is best on
  validation.
  """
  text = results.key(TEXT)
  keys = ["size", text]

  def of(where: arms.Where) -> pd.DataFrame:
    # Arm `flops`, the longer NTP runs, has no part in this.
    added = {"mtp.arm": "added"} if "mtp.arm" in results.trials else {}
    rows = results.measured("main_loss", where | added)
    if moment == "best":
      best = at_moment(results, "loss", "best", "min")
      rows = rows.assign(value=rows["trial"].map(best))
    rows = reported(rows.dropna(subset="value"), keys)
    return rows.drop_duplicates([*keys, *REPLICATE, "value"])

  pair = [*keys, *REPLICATE]
  tax = by_key(of(ARMS[arm][0]), pair) - by_key(of(arms.NTP), pair)
  return tax.dropna().rename("tax").reset_index().rename(columns={text: "text"})


def cells(rows: pd.DataFrame) -> dict[float, pd.Series]:
  """Returns {size: tax a seed}."""
  seeds = list(REPLICATE)
  return {size: own.set_index(seeds)["tax"] for size, own in rows.groupby("size")}


def fresh(rows: pd.DataFrame) -> pd.DataFrame:
  return rows[rows["text"] == rows["text"].min()]


def repeated(rows: pd.DataFrame) -> pd.DataFrame:
  """Returns the taxes on the least text; none if there is one amount of text."""
  is_most = rows["text"] == rows["text"].max()
  return rows[is_most & (rows["text"] > rows["text"].min())]


def costs(results: Results, arm: str) -> Finding:
  """Tests whether the arm loses to NTP on fresh text, at every size."""
  own = cells(fresh(taxes(results, arm)))
  return Finding(tuple(
    mean_over_seeds(tax, size_text(size)) for size, tax in own.items()
  ))


def falls(results: Results, arm: str) -> Finding:
  """Tests the slope of the log tax with size on fresh text."""
  own = cells(fresh(taxes(results, arm)))
  if len(own) < 2:
    return Finding(())
  over = {size: statistics.interval(tax) for size, tax in own.items()}
  flat = [size_text(size) for size, x in over.items() if not x["low"] > 0]
  if any(x["mean"] <= 0 for x in over.values()):
    slope = statistics.slope(list(own), list(own.values()))
    finding = Finding((estimate(slope, "of the tax itself, per decade", side="below"),))
  else:
    slope = statistics.log_slope(list(own), list(own.values()))
    finding = Finding((estimate(slope, "log10 tax per decade", side="below"),))
  if flat:
    return undecided(finding, f"the tax is not above 0 at {', '.join(flat)}")
  return finding


def repeated_gains(results: Results, arm: str, moment: str) -> Finding:
  """Tests whether the tax is a gain where the text is repeated most."""
  own = list(cells(repeated(taxes(results, arm, moment))).values())
  if not own:
    return Finding(())
  over = statistics.contrast(own, np.full(len(own), 1 / len(own)))
  return Finding((estimate(over, "mean tax", side="below"),))


def regimes(results: Results, arm: str) -> Finding:
  """Tests whether the tax is lower where the text is repeated most."""
  rows = taxes(results, arm)
  pair = ["size", *REPLICATE]
  change = repeated(rows).set_index(pair)["tax"] - fresh(rows).set_index(pair)["tax"]
  if change.dropna().empty:
    return Finding(())
  by_seed = change.dropna().unstack("size").mean(axis="columns", skipna=False)
  return Finding((mean_over_seeds(by_seed, "repeated minus fresh", side="below"),))


def d1_is_nil(results: Results) -> Finding:
  """Tests whether D = 1 at weight 0.3 costs nothing on fresh text, at every size."""
  own = cells(fresh(taxes(results, "d1")))
  p = [
    f"{size_text(size)} {statistics.equivalence(tax, NATS.value):.3f}"
    for size, tax in own.items() if len(tax) > 1
  ]
  return Finding(
    tuple(
      mean_over_seeds(tax, size_text(size), side="within", level=0.9)
      for size, tax in own.items()
    ),
    f"p of the two tests: {', '.join(p)}" if p else "",
  )


def table(results: Results) -> pd.DataFrame:
  """Returns the tax of every arm, amount of text and size, with its verdict."""
  rows = []
  for arm, (_, words) in ARMS.items():
    for text, own in taxes(results, arm).groupby("text"):
      for size, tax in cells(own).items():
        over = mean_over_seeds(tax)
        rows.append({
          "method": words, "held out": text, "size": size, "seeds": over.n,
          "mean": over.mean, "low": over.low, "high": over.high,
          "verdict": Finding((over,)).at(NATS).verdict,
        })
  return pd.DataFrame(rows)


def draw(results: Results) -> Drawing:
  """The tax of every arm against size."""
  figure, axes = panels(1, 1, width=6.5, height=5.0)
  table = draw_taxes(axes[0, 0], results)
  size_axis(axes[0, 0], table["size"])
  zero_line(axes[0, 0])
  legend_below(figure, axes.flat)
  return figure, table


def draw_taxes(ax, results: Results) -> pd.DataFrame:
  """Draws mean tax and interval against size; returns the numbers drawn."""
  drawn = []
  for index, (arm, (_, words)) in enumerate(ARMS.items(), start=1):
    rows = taxes(results, arm)
    for regime, part in (("fresh", fresh(rows)), ("repeated", repeated(rows))):
      line = pd.DataFrame(
        [{"size": s} | statistics.interval(tax) for s, tax in cells(part).items()]
      )
      if line.empty:
        continue
      ax.errorbar(
        line["size"] * 1.03 ** (index - 2), line["mean"], yerr=error_bars(line),
        capsize=3, label=f"{words}, {regime}",
        **series_style(index, is_hollow=regime == "repeated"),
      )
      drawn.append(line.assign(method=words, regime=regime))
  ax.set_ylabel("main loss minus NTP's,\nnats per token")
  return pd.concat(drawn, ignore_index=True)


def prediction(sizes: np.ndarray, taxes: np.ndarray, at: np.ndarray) -> pd.DataFrame:
  """Returns the power law of the mean tax at sizes `at`, with 95 % prediction interval.

  Least squares of log10 tax on log10 size; the interval is for the mean tax of one more
  size and widens away from the ladder. Needs three sizes and positive taxes.
  """
  x, y, new = np.log10(sizes), np.log10(taxes), np.log10(at)
  design = np.column_stack([np.ones(len(x)), x - x.mean()])
  coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
  freedom = len(x) - 2
  scale = np.sqrt(((y - design @ coefficients) ** 2).sum() / freedom)
  spread = 1 + 1 / len(x) + (new - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
  half = stats.t.ppf(0.975, freedom) * scale * np.sqrt(spread)
  middle = coefficients[0] + coefficients[1] * (new - x.mean())
  return pd.DataFrame({
    "size": at, "mean": 10**middle, "low": 10 ** (middle - half),
    "high": 10 ** (middle + half),
  })
