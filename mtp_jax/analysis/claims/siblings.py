"""Siblings: the gain of n = 2 by size and by data, in likelihood and in generation.

Three scores of every trial, each at the step that is best on validation prompts, and at
the last step, read on test prompts: held-out next-token loss; coherent answers
(`task_accuracy`); answers that are coherent, new and different (`task_new`). A gain is
NTP minus n = 2 for the loss, n = 2 minus NTP for the shares, of trials of one size,
data set (children a parent, training examples, 0 for endless) and seed.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims.arms import at_moment, reported
from mtp_jax.analysis.claims.claim import OWN, Claim, Drawing, Experiment
from mtp_jax.analysis.drawing import (
  error_bars,
  legend_below,
  panels,
  series_style,
  size_axis,
  zero_line,
)
from mtp_jax.analysis.results import REPLICATE, Results
from mtp_jax.analysis.rules import NATS, POINTS, Finding, Margin, by_key, estimate

CHILDREN, EXAMPLES = "task.siblings.num_children", "task.num_train"
DATA = [CHILDREN, EXAMPLES]
WEIGHT = 1.0  # Of the extra loss, in the claims; the table has the others.


@dataclasses.dataclass(frozen=True)
class Score:
  """A column of curves.csv, which way is better, and its margins."""

  column: str
  words: str
  best: str
  margin: Margin
  per_decade: Margin

  @property
  def sign(self) -> int:
    """Turns n = 2 minus NTP into a gain."""
    return -1 if self.best == "min" else 1


# The ladder spans about two decades: half a margin a decade is one from end to end.
_POINTS_PER_DECADE = Margin(POINTS.value / 2, "(2.5 points) per decade")
SCORES = {
  "loss": Score(
    "loss", "held-out next-token loss", "min", NATS,
    Margin(NATS.value / 2, "nats per decade"),
  ),
  "coherent": Score(
    "task_accuracy", "coherent answers", "max", POINTS, _POINTS_PER_DECADE
  ),
  "new": Score(
    "task_new", "new coherent answers", "max", POINTS, _POINTS_PER_DECADE
  ),
}


def experiment(preset: str) -> Experiment:
  return Experiment(
    "siblings", preset, "Siblings: size, data and the gain of n = 2",
    "Gain of n = 2 over NTP at the best step, mean and 95 % t interval over seeds; one "
    "line a data set, filled for repeated data and hollow for endless data.",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[Claim]:
  at = "at the step best on validation, read on test"
  grow = (
    "slope per decade of parameters of the paired gain in {}, {}, with a level of its "
    "own for each {} data set; seeds resampled within size and data set (BCa), {} 0"
  )

  def own(key, statement, rule, margin, test, **how):
    return Claim(
      key, statement, OWN, "nothing", rule, margin, functools.partial(test, **how)
    )

  for name, score in SCORES.items():
    yield own(
      f"{name}_gains", f"Repeated data: n = 2 gains in {score.words}",
      f"paired gain {at}, averaged over sizes and repeated data sets, above 0",
      score.margin, gains_on_average, score=name,
    )
    for moment, when in (("best", at), ("last", "at the last step")):
      of = "" if moment == "best" else " at the last step"
      yield own(
        f"{name}_grows{'' if moment == 'best' else '_last'}",
        f"Repeated data: the gain in {score.words}{of} grows with size",
        grow.format(score.words, when, "repeated", "above"),
        score.per_decade, grows, score=name, moment=moment,
      )
  loss = SCORES["loss"]
  yield own(
    "loss_shrinks_endless",
    f"Endless data: the gain in {loss.words} shrinks with size",
    grow.format(loss.words, at, "endless", "below"), loss.per_decade, grows,
    score="loss", is_endless=True, side="below",
  )
  yield own(
    "regimes_part", "The gain grows faster with size on repeated data than on endless",
    f"the first of these slopes minus the second, {loss.words}, above 0",
    loss.per_decade, regimes_part,
  )
  yield own(
    "capacity_over_data", "The gain is about capacity over data",
    f"linear model of the paired gain in {loss.words}, {at}, on repeated data: log10 "
    "parameters, log10 examples, their product (both centred) and a level for each "
    "number of children; seeds resampled within size and data set (BCa); the "
    "coefficients of log parameters and of minus log examples, both above 0",
    loss.per_decade, capacity_over_data,
  )


def gains(
  results: Results, score: str, moment: str = "best", depth: int = 1
) -> pd.DataFrame:
  """Returns the paired gains: columns DATA, size, mtp.weight, seed and gain."""
  keys = [results.key(key) for key in DATA]
  own = SCORES[score]
  arm = [*keys, "size", "mtp.depth", results.key("mtp.weight")]
  rows = results.select({})
  # The weight of no extra loss has no effect.
  rows = rows.assign(**{"mtp.weight": rows["mtp.weight"].where(rows["mtp.depth"] > 0)})
  rows = reported(rows[rows["mtp.depth"].isin([0, depth])], arm)
  rows = rows.assign(
    value=rows["trial"].map(at_moment(results, own.column, moment, own.best))
  ).dropna(subset="value")
  pair = [*keys, "size", *REPLICATE]
  is_ntp = rows["mtp.depth"] == 0
  # A sweep over weights may train the same NTP trial once for each.
  ntp = by_key(rows[is_ntp].drop_duplicates([*pair, "value"]), pair).rename("ntp")
  pairs = by_key(rows[~is_ntp], [*pair, "mtp.weight"]).reset_index()
  pairs = pairs.join(ntp, on=pair, how="inner")
  return pairs.assign(gain=own.sign * (pairs["value"] - pairs["ntp"]))


def repeated(pairs: pd.DataFrame, is_endless: bool = False) -> pd.DataFrame:
  """Returns the gains of the claims: of one weight, on repeated or on endless data."""
  is_own = pairs["mtp.weight"] == WEIGHT
  return pairs[is_own & ((pairs[EXAMPLES] == 0) == is_endless)]


def _cells(pairs: pd.DataFrame) -> tuple[pd.DataFrame, list[np.ndarray]]:
  """Returns one row a cell (DATA, size) and the gains of its seeds."""
  groups = list(pairs.groupby([*DATA, "size"]))
  index = pd.DataFrame([key for key, _ in groups], columns=[*DATA, "size"])
  return index, [own["gain"].to_numpy() for _, own in groups]


def gains_on_average(results: Results, score: str) -> Finding:
  """Tests the gain averaged over the cells of repeated data."""
  index, cells = _cells(repeated(gains(results, score)))
  if not cells:
    return Finding(())
  weights = np.full(len(cells), 1 / len(cells))
  over = statistics.contrast(cells, weights)
  return Finding((estimate(over, "mean gain"),), _precision(index, cells))


def _slope(pairs: pd.DataFrame) -> dict[str, float] | None:
  """Returns the common slope over data sets that have two sizes, or None."""
  sizes = pairs.groupby(DATA)["size"].transform("nunique")
  index, cells = _cells(pairs[sizes > 1])
  return statistics.contrast(cells, _slope_weights(index, cells)) if cells else None


def _slope_weights(index: pd.DataFrame, cells: list[np.ndarray]) -> np.ndarray:
  levels = pd.get_dummies(index[DATA].astype(str).agg(" ".join, axis=1), dtype=float)
  design = np.column_stack([np.log10(index["size"].astype(float)), levels])
  return statistics.least_squares(design, cells)[0]


def grows(
  results: Results, score: str, moment: str = "best", is_endless: bool = False,
  side: str = "above",
) -> Finding:
  """Tests the slope of the gain with size at fixed data."""
  pairs = repeated(gains(results, score, moment), is_endless)
  over = _slope(pairs)
  if over is None:
    return Finding(())
  return Finding(
    (estimate(over, "per decade", side=side),), _precision(*_cells(pairs))
  )


def regimes_part(results: Results) -> Finding:
  """Tests whether the slope on repeated data is larger than on endless data."""
  pairs = gains(results, "loss")
  parts = []
  for is_endless in (False, True):
    own = repeated(pairs, is_endless)
    own = own[own.groupby(DATA)["size"].transform("nunique") > 1]
    index, cells = _cells(own)
    if not cells:
      return Finding(())
    parts.append((cells, _slope_weights(index, cells)))
  (cells, weights), (others, minus) = parts
  over = statistics.contrast(cells + others, np.concatenate([weights, -minus]))
  return Finding((estimate(over, "difference per decade"),))


def capacity_over_data(results: Results) -> Finding:
  """Tests the linear model of the gain on log size and log data."""
  index, cells = _cells(repeated(gains(results, "loss")))
  if not cells or index["size"].nunique() < 2 or index[EXAMPLES].nunique() < 2:
    return Finding(())
  size, data = (
    np.log10(index[key].astype(float)) - np.log10(index[key].astype(float)).mean()
    for key in ("size", EXAMPLES)
  )
  levels = pd.get_dummies(index[CHILDREN], dtype=float)
  design = np.column_stack([size, -data, -size * data, levels])
  weights = statistics.least_squares(design, cells)
  over = [statistics.contrast(cells, weights[i]) for i in range(3)]
  apart = statistics.contrast(cells, weights[0] - weights[1])
  return Finding(
    (
      estimate(over[0], "log10 parameters"), estimate(over[1], "minus log10 examples"),
    ),
    f"their product {estimate(over[2])}; the first minus the second {estimate(apart)}",
  )


def _precision(index: pd.DataFrame, cells: list[np.ndarray]) -> str:
  """How many seeds there are and the spread of a gain between them."""
  counts = [len(x) for x in cells]
  spread = [x.std(ddof=1) for x in cells if len(x) > 1]
  seeds = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
  words = f"{index['size'].nunique()} sizes, {len(cells)} cells of {seeds} seeds"
  return f"{words}, sd of a gain {np.median(spread):.4f}" if spread else words


def table(results: Results) -> pd.DataFrame:
  """Returns every cell: gain of each score at either moment, interval and verdict.

  Rows whose size is empty are slopes per decade at that data set.
  """
  rows = []
  for name, moment in ((x, m) for x in SCORES for m in ("best", "last")):
    score = SCORES[name]
    pairs = gains(results, name, moment)
    for (children, examples, weight), own in pairs.groupby([*DATA, "mtp.weight"]):
      key = {
        "score": name, "step": moment, "children": children,
        "examples": examples or "endless", "weight": weight,
      }
      for size, cell in own.groupby("size"):
        over = statistics.interval(cell["gain"].to_numpy())
        rows.append(_row(key | {"size": size}, over, score.margin))
      over = _slope(own)
      if over:
        rows.append(_row(key | {"size": ""}, over, score.per_decade))
  return pd.DataFrame(rows)


def _row(key: dict, over: dict[str, float], margin: Margin) -> dict:
  finding = Finding((estimate(over),)).at(margin)
  seeds = {"seeds": over["n"]} | {k: over[k] for k in ("mean", "low", "high")}
  return key | seeds | {"margin": margin.value, "verdict": finding.verdict}


def draw(results: Results) -> Drawing:
  """Gain of each score against size at the best step, one line a data set."""
  figure, axes = panels(1, len(SCORES), width=10.0, height=4.2)
  tables = []
  for ax, (name, score) in zip(axes.flat, SCORES.items(), strict=True):
    pairs = gains(results, name)
    pairs = pairs[pairs["mtp.weight"] == WEIGHT]
    tables.append(draw_gains(ax, pairs).assign(score=name))
    ax.set_ylabel(f"gain of n = 2 in {score.words}")
    zero_line(ax)
  legend_below(figure, axes.flat)
  return figure, pd.concat(tables, ignore_index=True)


def draw_gains(ax, pairs: pd.DataFrame) -> pd.DataFrame:
  """Draws mean gain and interval against size; returns the numbers drawn."""
  drawn = []
  groups = list(pairs.groupby(DATA))
  for index, ((children, examples), own) in enumerate(groups):
    line = pd.DataFrame(
      [{"size": s} | statistics.interval(c["gain"]) for s, c in own.groupby("size")]
    )
    amount = f"{examples:,} examples" if examples else "endless"
    ax.errorbar(
      line["size"] * 1.03 ** (index - (len(groups) - 1) / 2), line["mean"],
      yerr=error_bars(line), capsize=3, label=f"{children} children, {amount}",
      **series_style(index, is_hollow=not examples),
    )
    drawn.append(line.assign(children=children, examples=examples))
  if len(pairs):
    size_axis(ax, pairs["size"])
  return pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()
