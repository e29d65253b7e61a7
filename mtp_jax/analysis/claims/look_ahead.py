"""Look-ahead on star graphs: how much sooner it is learnt, by width and by depth.

The gain of an arm is NTP's minus the arm's restricted mean of ln(tokens) until the path
is solved (`solving`), paired by seed: 0.26 is a factor of 1.3 fewer tokens. `added`
puts the extra heads on the whole trunk, `shortened` takes their layers from it.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import arms, solving
from mtp_jax.analysis.claims.arms import WIDTH, reported
from mtp_jax.analysis.claims.claim import TOP, Claim, Drawing, Experiment
from mtp_jax.analysis.drawing import (
  error_bars,
  legend_below,
  panels,
  series_style,
  share_axis,
  size_axis,
  zero_line,
)
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import Results
from mtp_jax.analysis.rules import (
  FACTOR,
  FACTOR_PER_DECADE,
  Finding,
  estimate,
  mean_over_seeds,
)

LAYERS, ARM = "trunk.num_layers", "mtp.arm"
NTP = {**arms.NTP, ARM: "added"}  # Arm `flops` is of longer runs.
GRAPH = ["task.star_graph.arms", "task.star_graph.length"]
# {name: (config values, words)}
ARMS = {
  "n2": ({**arms.parallel(2), ARM: "added"}, "n = 2"),
  "n4": ({**arms.parallel(4), ARM: "added"}, "n = 4"),
  "d1": ({**arms.sequential(1), ARM: "added"}, "sequential D = 1"),
  "n2_shortened": ({**arms.parallel(2), ARM: "shortened"}, "n = 2, shortened"),
  "n4_shortened": ({**arms.parallel(4), ARM: "shortened"}, "n = 4, shortened"),
}


def experiment(preset: str) -> Experiment:
  return Experiment(
    "look_ahead", preset, "Look-ahead: when a star graph is learnt, by size",
    "Left: tokens saved until 95 % of paths are right, in ln, mean and 95 % t interval "
    "over seeds. Then, size by size, the share of seeds that have solved it "
    "(Kaplan-Meier).",
    tuple(_claims()), draw, table=table,
  )


def _claims() -> Iterator[Claim]:
  published = "14M, G(3,3): NTP 33.8 %, n = 2 and n = 4 100 % exact paths (one run)"

  def own(key, statement, rule, margin, test, **how):
    return Claim(
      key, statement, f"{TOP}, table 5, has one size", published, rule, margin,
      functools.partial(test, **how),
    )

  for arm in ("n2", "n4"):
    words = ARMS[arm][1]
    yield own(
      f"{arm}_sooner", f"{words} learns star graphs in fewer tokens than NTP",
      f"width ladder; {solving.RULE}, averaged over sizes with seeds resampled within "
      "size (BCa), above 0",
      FACTOR, sooner, arm=arm,
    )
    yield own(
      f"{arm}_grows", f"The tokens that {words} saves grow with size",
      "width ladder; slope per decade of parameters of this gain, seeds resampled "
      "within size (BCa), above 0; sizes where no seed of either solves it left out",
      FACTOR_PER_DECADE, grows, arm=arm,
    )
    yield own(
      f"{arm}_crosses", f"{words} costs tokens at the smallest size, saves at the last",
      "width ladder; gain at the smallest size below 0 and at the largest above 0",
      FACTOR, crosses, arm=arm,
    )
  yield own(
    "shallow_none", "With one or two layers n = 2 makes no difference",
    f"depth ladder, at most 2 layers; {solving.RULE}, within the margin",
    FACTOR, at_depths, arm="n2", most=2, side="within",
  )
  yield own(
    "shortened_costs", "n = 2 with a shortened trunk of up to 4 layers costs tokens",
    f"at most 4 layers, averaged within a seed; {solving.RULE}, below 0",
    FACTOR, at_depths, arm="n2_shortened", most=4, side="below",
  )


def ladder(results: Results, by: str = "width") -> pd.DataFrame:
  """Returns the trials of a ladder with tokens_to and solved.

  The width ladder has the layers that most widths have; the depth ladder the width
  that most numbers of layers have. The easiest graph (fewest arms, then shortest path).
  """
  rows = solving.solve_times(results, {})
  for key in (WIDTH, LAYERS, *GRAPH):
    results.key(key)
  if rows.empty:
    return rows
  first = rows[GRAPH].drop_duplicates().sort_values(GRAPH).iloc[0]
  rows = rows[(rows[GRAPH] == first).all(axis="columns")]
  varied, fixed = (WIDTH, LAYERS) if by == "width" else (LAYERS, WIDTH)
  most = rows.groupby(fixed)[varied].nunique().idxmax()
  rows = rows[rows[fixed] == most]
  arm = ["size", "mtp.kind", "mtp.depth", *([ARM] if ARM in rows else [])]
  return reported(rows, arm)


def _of(rows: pd.DataFrame, where: arms.Where) -> pd.DataFrame:
  for key, value in where.items():
    if key != ARM or ARM in rows:
      rows = rows[rows[key] == value]
  return rows


def gains(rows: pd.DataFrame, arm: str) -> dict[float, pd.Series]:
  """Returns {size: gain a seed}; sizes at which no seed of either solves are left out.

  Where nobody solves the restricted means are equal by construction.
  """
  where, cells = ARMS[arm][0], {}
  for size, cell in rows.groupby("size"):
    ntp, own = _of(cell, NTP), _of(cell, where)
    if len(ntp) and len(own) and (ntp["solved"].any() or own["solved"].any()):
      gain = solving.gain_in_log_time(ntp, own).dropna()
      if len(gain):
        cells[size] = gain
  return cells


def sooner(results: Results, arm: str) -> Finding:
  """Tests the gain, averaged over sizes."""
  rows = ladder(results)
  cells = gains(rows, arm)
  if not cells:
    return Finding(())
  weights = np.full(len(cells), 1 / len(cells))
  over = statistics.contrast(list(cells.values()), weights)
  return Finding((estimate(over, "ln(tokens) saved"),), _shares(rows, arm))


def grows(results: Results, arm: str) -> Finding:
  """Tests the slope of the gain with size."""
  rows = ladder(results)
  cells = gains(rows, arm)
  if len(cells) < 2:
    return Finding(())
  over = statistics.slope(list(cells), list(cells.values()))
  return Finding((estimate(over, "per decade"),), _shares(rows, arm))


def crosses(results: Results, arm: str) -> Finding:
  """Tests whether the sign of the gain turns between the ends of the ladder."""
  cells = gains(ladder(results), arm)
  if len(cells) < 2:
    return Finding(())
  return Finding(tuple(
    mean_over_seeds(cells[size], size_text(size), side=side)
    for size, side in ((min(cells), "below"), (max(cells), "above"))
  ))


def at_depths(results: Results, arm: str, most: int, side: str) -> Finding:
  """Tests the gain at few layers, averaged within a seed."""
  rows = ladder(results, "depth")
  cells = gains(rows[rows[LAYERS] <= most], arm) if len(rows) else {}
  if not cells:
    return Finding(())
  per_seed = pd.concat(cells, axis="columns").mean(axis="columns", skipna=False)
  return Finding((mean_over_seeds(per_seed, f"at most {most} layers", side=side),))


def _shares(rows: pd.DataFrame, arm: str) -> str:
  """How many seeds solve the task at each size."""
  parts = []
  for size, cell in rows.groupby("size"):
    own, ntp = _of(cell, ARMS[arm][0]), _of(cell, NTP)
    counts = [f"{int(x['solved'].sum())}/{len(x)}" for x in (ntp, own)]
    parts.append(f"{size_text(size)} {' and '.join(counts)}")
  return f"solved by NTP and by {ARMS[arm][1]}: {', '.join(parts)}"


def table(results: Results) -> pd.DataFrame:
  """Returns the gain of every arm and size on either ladder, with its verdict."""
  rows = []
  for by in ("width", "depth"):
    trials = ladder(results, by)
    for arm, (where, words) in ARMS.items():
      for size, gain in gains(trials, arm).items() if len(trials) else ():
        cell = trials[trials["size"] == size]
        own, ntp = _of(cell, where), _of(cell, NTP)
        over = mean_over_seeds(gain)
        rows.append({
          "ladder": by, "width": cell[WIDTH].iloc[0], "layers": cell[LAYERS].iloc[0],
          "size": size, "method": words, "seeds": over.n, "mean": over.mean,
          "low": over.low, "high": over.high, "solved": own["solved"].mean(),
          "solved by NTP": ntp["solved"].mean(),
          "verdict": Finding((over,)).at(FACTOR).verdict,
        })
  return pd.DataFrame(rows)


def draw(results: Results) -> Drawing:
  """The gain against size, and the share of seeds that solved it, size by size."""
  rows = ladder(results)
  sizes = sorted(rows["size"].unique())
  figure, axes = panels(
    1, 1 + len(sizes), width=3.4 + 2.2 * len(sizes), height=3.8,
    width_ratios=[1.6, *[1] * len(sizes)],
  )
  first, *others = axes.flat
  tables = [draw_gains(first, rows).assign(shown="gain")]
  shown = {"NTP": NTP} | {words: where for where, words in ARMS.values()}
  for ax, size in zip(others, sizes, strict=True):
    for index, (words, where) in enumerate(shown.items()):
      own = _of(rows[rows["size"] == size], where)
      if own.empty:
        continue
      curve = statistics.kaplan_meier(own["tokens_to"], own["solved"])
      style = series_style(index) | {"marker": "", "label": words}
      x, y = ([0, *curve[key]] for key in ("time", "share"))
      ax.step(x, y, where="post", **style)
      tables.append(curve.assign(size=size, method=words, shown="solved"))
    ax.set(title=f"{size_text(size)} parameters", xlabel="tokens")
    ax.xaxis.set_major_formatter(lambda x, _: size_text(x) if x else "0")
    ax.locator_params(axis="x", nbins=3)
    share_axis(ax)
  if others:
    others[0].set_ylabel("share of seeds that solved it")
  legend_below(figure, axes.flat)
  return figure, pd.concat(tables, ignore_index=True)


def draw_gains(ax, rows: pd.DataFrame) -> pd.DataFrame:
  """Draws mean gain and interval of every arm against size; returns the numbers."""
  drawn = []
  for index, (arm, (_, words)) in enumerate(ARMS.items(), start=1):
    cells = gains(rows, arm)
    line = pd.DataFrame(
      [{"size": s} | statistics.interval(x) for s, x in sorted(cells.items())]
    )
    if len(line):
      ax.errorbar(
        line["size"] * 1.03 ** (index - 2), line["mean"], yerr=error_bars(line),
        capsize=3, label=words, **series_style(index),
      )
      drawn.append(line.assign(method=words))
  size_axis(ax, rows["size"])
  ax.set_ylabel("ln(tokens) saved until solved")
  zero_line(ax)
  return pd.concat(drawn, ignore_index=True) if drawn else pd.DataFrame()
