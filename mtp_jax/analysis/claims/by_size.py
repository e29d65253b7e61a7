"""Gains against size: the average, the slope and the picture of a ladder of sizes.

`pairs` has one row a pair of trials of one seed: `size`, REPLICATE, `gain`, and what
else tells cells apart (a data set, say). A cell is a size with these.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims.claim import Finding, Margin, estimate, over_seeds
from mtp_jax.analysis.drawing import size_axis, size_lines, zero_line
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE

Cells = tuple[pd.DataFrame, list[np.ndarray]]
# Pairs with a column `series`, and the style of each series.
Series = tuple[pd.DataFrame, dict[str, dict[str, Any]]]


def cells(
  pairs: pd.DataFrame, apart: Sequence[str] = (), sort: bool = True
) -> Cells:
  """Returns one row a cell (`apart`, size), and the gains of its seeds."""
  groups = list(pairs.groupby([*apart, "size"], sort=sort))
  index = pd.DataFrame([key for key, _ in groups], columns=[*apart, "size"])
  return index, [own["gain"].to_numpy() for _, own in groups]


def average(
  pairs: pd.DataFrame, label: str, note: str = "", apart: Sequence[str] = (), **how: Any
) -> Finding:
  """Returns the gain averaged over cells, seeds resampled within each."""
  _, own = cells(pairs, apart)
  if not own:
    return Finding()
  over = statistics.contrast(own, np.full(len(own), 1 / len(own)))
  return Finding((estimate(over, label, **how),), note)


def slope(pairs: pd.DataFrame, apart: Sequence[str] = ()) -> dict[str, float] | None:
  """Returns the slope per decade common to what is `apart`; None without two sizes."""
  over = slope_cells(pairs, apart)
  return statistics.contrast(*over) if over else None


def slope_cells(
  pairs: pd.DataFrame, apart: Sequence[str] = ()
) -> tuple[list[np.ndarray], np.ndarray] | None:
  """Returns the cells and their weights in the slope, each data set with a level."""
  if apart:
    sizes = pairs.groupby(list(apart))["size"].transform("nunique")
    pairs = pairs[sizes > 1]
  index, own = cells(pairs, apart)
  if index["size"].nunique() < 2:
    return None
  levels = index[list(apart)].astype(str).agg(" ".join, axis=1) if apart else None
  return own, statistics.slope_weights(index["size"], own, levels)


def each_size(pairs: pd.DataFrame, **how: Any) -> Finding:
  """Returns an estimate for every size, smallest first."""
  return Finding(tuple(
    over_seeds(cell.set_index(list(REPLICATE))["gain"], size_text(size), **how)
    for size, cell in pairs.groupby("size")
  ))


def precision(pairs: pd.DataFrame, apart: Sequence[str] = ()) -> str:
  """Returns how many seeds there are, and the spread of a gain between them."""
  index, own = cells(pairs, apart)
  counts = [len(x) for x in own]
  spread = [x.std(ddof=1) for x in own if len(x) > 1]
  seeds = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
  words = f"{index['size'].nunique()} sizes, {len(own)} cells of {seeds} seeds"
  return f"{words}, sd of a gain {np.median(spread):.4f}" if spread else words


def rows(
  pairs: pd.DataFrame, key: dict[str, Any], margin: Margin,
  per_decade: Margin | None = None,
) -> list[dict]:
  """Returns the rows of a table: the gain of every size and, without a size, its slope.
  """
  own = [
    (size, statistics.interval(cell["gain"].to_numpy()), margin)
    for size, cell in pairs.groupby("size")
  ]
  over = slope(pairs) if per_decade else None
  if over:
    own.append(("", over, per_decade))
  return [
    key | {"size": size, "seeds": over["n"]}
    | {end: over[end] for end in ("mean", "low", "high")}
    | {"margin": by.value, "verdict": Finding((estimate(over),)).at(by).verdict}
    for size, over, by in own
  ]


def draw(
  ax: Axes, pairs: pd.DataFrame, styles: dict[str, dict[str, Any]], ylabel: str
) -> pd.DataFrame:
  """Draws mean and interval against size, a line for each `series`; returns them."""
  rows = [
    {"size": size} | statistics.interval(own["gain"]) | {"series": name}
    for (name, size), own in pairs.groupby(["series", "size"], sort=False)
  ]
  table = pd.DataFrame(rows, columns=["size", "n", "mean", "low", "high", "series"])
  order = pd.factorize(table["series"])[0]
  size_lines(ax, table.assign(method=table["series"], order=order), styles)
  if len(pairs):
    size_axis(ax, pairs["size"])
  # No gain is part of every picture of gains.
  low, high = ax.get_ylim()
  ax.set_ylim(min(low, 0.0), max(high, 0.0))
  zero_line(ax)
  ax.set_ylabel(ylabel)
  return table.sort_values(["series", "size"], ignore_index=True)
