"""Siblings: the gain of n = 2 by size and by data, in likelihood and in generation.

Three scores of every trial, each at the step that is best on validation prompts, and at
the last step, read on test prompts: held-out next-token loss; coherent answers
(`task_accuracy`); answers that are coherent, new and different (`task_new`). A gain is
NTP minus n = 2 for the loss, n = 2 minus NTP for the shares, of trials of one size,
data set (children a parent, training examples, 0 for endless) and seed.
"""

import dataclasses
import textwrap
from collections.abc import Iterator

import numpy as np
import pandas as pd

from mtp_jax.analysis import drawing, statistics
from mtp_jax.analysis.claims import arms, by_size, claim
from mtp_jax.analysis.results import Results, Where

CHILDREN, EXAMPLES = "task.siblings.num_children", "task.num_train"
DATA = [CHILDREN, EXAMPLES]
WEIGHT = 1.0  # Of the extra loss, in the claims; the table has the others.


@dataclasses.dataclass(frozen=True)
class Score:
  """A column of curves.csv, which way is better, and its margins."""

  column: str
  words: str
  best: str
  margin: claim.Margin
  per_decade: claim.Margin


# The ladder spans about two decades: half a margin a decade is one from end to end.
_NATS_PER_DECADE = claim.Margin(claim.NATS.value / 2, "nats per decade")
_POINTS_PER_DECADE = claim.Margin(claim.POINTS.value / 2, "(2.5 points) per decade")
SCORES = {
  "loss": Score(
    "loss", "held-out next-token loss", "min", claim.NATS, _NATS_PER_DECADE
  ),
  "coherent": Score(
    "task_accuracy", "coherent answers", "max", claim.POINTS, _POINTS_PER_DECADE
  ),
  "new": Score(
    "task_new", "new coherent answers", "max", claim.POINTS, _POINTS_PER_DECADE
  ),
}


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "siblings", preset, "Siblings: size, data and the gain of n = 2",
    "Gain of n = 2 over NTP at the best step (nats, shares), mean and 95 % t interval "
    "over seeds; one line a data set, filled for repeated data and hollow for endless "
    "data.",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[claim.Claim]:
  at = "at the step best on validation, read on test"
  grow = (
    "slope per decade of parameters of the paired gain in {}, {}, with a level of its "
    "own for each {} data set; seeds resampled within size and data set (BCa), {} 0"
  )

  def own(key, statement, rule, margin, test, *how):
    return claim.Claim(
      key, statement, claim.OWN, "nothing", rule, margin,
      lambda results: test(results, *how),
    )

  for name, score in SCORES.items():
    yield own(
      f"{name}_gains", f"Repeated data: n = 2 gains in {score.words}",
      f"paired gain {at}, averaged over sizes and repeated data sets, above 0",
      score.margin, gains_on_average, name,
    )
    for moment, when in (("best", at), ("last", "at the last step")):
      of = "" if moment == "best" else " at the last step"
      yield own(
        f"{name}_grows{'' if moment == 'best' else '_last'}",
        f"Repeated data: the gain in {score.words}{of} grows with size",
        grow.format(score.words, when, "repeated", "above"),
        score.per_decade, changes_with_size, name, moment,
      )
  loss = SCORES["loss"]
  yield own(
    "loss_shrinks_endless",
    f"Endless data: the gain in {loss.words} shrinks with size",
    grow.format(loss.words, at, "endless", "below"), loss.per_decade,
    changes_with_size, "loss", "best", True, "below",
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
  results: Results, score: str, moment: str = "best", weight: float = WEIGHT,
  arm: Where | None = None,
) -> pd.DataFrame:
  """Returns the paired gains: columns DATA, size, REPLICATE and gain.

  arm: the config values of the trials beside NTP's; default: all with one extra depth.
  """
  own = SCORES[score]
  data = [results.key(key) for key in DATA]
  rows = results.select({})
  rows = rows.assign(
    value=rows["trial"].map(
      arms.at_moment(results, own.column, moment, own.best)
    ).astype(float)
  )
  ntp, two = rows[rows["mtp.depth"] == 0], rows[rows["mtp.depth"] == 1]
  two = two[two[results.key("mtp.weight")] == weight]
  two = two[two["trial"].isin(results.select(arm or {})["trial"])]
  cell = [*data, "size"]
  ntp, two = (arms.reported(x, cell).dropna(subset="value") for x in (ntp, two))
  return arms.pairs(ntp, two, cell, 1 if own.best == "min" else -1)


def of(pairs: pd.DataFrame, is_endless: bool = False) -> pd.DataFrame:
  """Returns the gains on repeated or on endless data."""
  return pairs[(pairs[EXAMPLES] == 0) == is_endless]


def gains_on_average(results: Results, score: str) -> claim.Finding:
  """Tests the gain averaged over the cells of repeated data."""
  pairs = of(gains(results, score))
  note = by_size.precision(pairs, DATA) if len(pairs) else ""
  return by_size.average(pairs, "mean gain", note, DATA)


def changes_with_size(
  results: Results, score: str, moment: str = "best", is_endless: bool = False,
  side: claim.Side = "above",
) -> claim.Finding:
  """Tests the slope of the gain with size at fixed data."""
  pairs = of(gains(results, score, moment), is_endless)
  over = by_size.slope(pairs, DATA)
  if over is None:
    return claim.Finding()
  note = by_size.precision(pairs, DATA)
  return claim.Finding((claim.estimate(over, "per decade", side=side),), note)


def regimes_part(results: Results) -> claim.Finding:
  """Tests whether the slope on repeated data is larger than on endless data."""
  pairs = gains(results, "loss")
  parts = [by_size.slope_cells(of(pairs, is_endless), DATA) for is_endless in (0, 1)]
  if None in parts:
    return claim.Finding()
  (cells, weights), (others, minus) = parts
  over = statistics.contrast(cells + others, np.concatenate([weights, -minus]))
  return claim.Finding((claim.estimate(over, "difference per decade"),))


def capacity_over_data(results: Results) -> claim.Finding:
  """Tests the linear model of the gain on log size and log data."""
  index, cells = by_size.cells(of(gains(results, "loss")), DATA)
  if index["size"].nunique() < 2 or index[EXAMPLES].nunique() < 2:
    return claim.Finding()
  logs = np.log10(index[["size", EXAMPLES]].astype(float))
  size, data = (logs - logs.mean()).to_numpy().T
  levels = pd.get_dummies(index[CHILDREN], dtype=float)
  design = np.column_stack([size, -data, -size * data, levels])
  # Cells that are still missing may leave the coefficients without a solution.
  if np.linalg.matrix_rank(design) < design.shape[1]:
    return claim.Finding()
  weights = statistics.least_squares(design, cells)
  wanted = (*weights[:3], weights[0] - weights[1])
  own, examples, both, apart = (
    claim.estimate(statistics.contrast(cells, x)) for x in wanted
  )
  return claim.Finding(
    (
      dataclasses.replace(own, label="log10 parameters"),
      dataclasses.replace(examples, label="minus log10 examples"),
    ),
    f"their product {both}; the first minus the second {apart}",
  )


def table(results: Results) -> pd.DataFrame:
  """Returns every cell: gain of each score at either moment, interval and verdict.

  Rows whose size is empty are slopes per decade at that data set.
  """
  extra = results.select({"mtp.depth": 1})["mtp.weight"]
  return pd.DataFrame([
    row
    for name, score in SCORES.items() for moment in ("best", "last")
    for weight in sorted(extra.unique())
    for (children, examples), own in gains(results, name, moment, weight).groupby(DATA)
    for row in by_size.rows(
      own,
      {"score": name, "step": moment, "children": children,
       "examples": examples or "endless", "weight": weight},
      score.margin, score.per_decade,
    )
  ])


def draw(results: Results) -> claim.Drawing:
  """Draws the gain of each score against size at the best step, a line a data set."""
  figure, axes = drawing.panels(1, len(SCORES), height=4.0)
  tables = []
  for ax, (name, score) in zip(axes.flat, SCORES.items(), strict=True):
    table = by_size.draw(ax, *series(results, name), "")
    ax.set_title(textwrap.fill(score.words, 22))
    tables.append(table.assign(score=name))
  axes[0, 0].set_ylabel("gain of n = 2 over NTP (nats, then shares)")
  drawing.legend_below(figure, axes.flat)
  return figure, pd.concat(tables, ignore_index=True)


def series(results: Results, score: str = "loss") -> by_size.Series:
  """Returns the gains with the line that shows each, and the look of the lines."""
  pairs = gains(results, score)
  # A data set looks the same for every score; endless data come last.
  data = results.trials[DATA].drop_duplicates().sort_values(DATA)
  data = data.sort_values(EXAMPLES, key=lambda x: x == 0, kind="stable").to_numpy()
  several = len({children for children, _ in data}) > 1
  names = {
    (children, examples): "n = 2, "
    + (f"{examples:,} examples" if examples else "endless examples")
    + (f" of {children} children" if several else "")
    for children, examples in data
  }
  styles = {
    name: drawing.series_style(index, is_hollow=not own[1])
    for index, (own, name) in enumerate(names.items())
  }
  own = list(pairs[DATA].itertuples(index=False, name=None))
  pairs = pairs.assign(
    series=pd.Categorical([names[x] for x in own], styles),
    group=[f"n = 2 on {'repeated' if x[1] else 'endless'} examples" for x in own],
  )
  return pairs.sort_values(["series", "size"]).astype({"series": str}), styles
