"""How a figure of the report looks: colours, markers, lines, bars, axes, legends.

Colour is the kind of predictor, the marker is D; another marker and line style tell
further variants of the same kind and D apart. A hollow marker with an arrow is a bound.
All text has one size.
"""

import itertools
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  FixedLocator,
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullLocator,
)

from mtp_jax.analysis.gains import UPPER
from mtp_jax.analysis.ladders import size_text
from mtp_jax.predictors import KINDS

# Okabe and Ito (2008): told apart with every common kind of colour blindness.
_PALETTE = (
  "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
)
COLOURS = dict(zip(KINDS, itertools.cycle(_PALETTE), strict=False))
_MARKERS = {0: "o", 1: "s", 2: "^", 3: "D", 4: "v", 5: "P", 6: "X", 7: "*"}
LINES = ("-", "--", ":", "-.")
_ZERO = dict(color="#777777", linewidth=0.8)
# No marker of a depth is among those of further variants.
_VARIANTS = "hpd<>8HX"
_SERIES = "os^DvPX*"
STYLE = {
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e0e0e0",
  "grid.linewidth": 0.6,
  "axes.axisbelow": True,
  "legend.frameon": False,
  "lines.markersize": 5,
}


def panels(
  rows: int, columns: int, height: float | None = None, width: float | None = None,
  **shared: Any,
) -> tuple[Figure, np.ndarray]:
  figure = Figure(
    figsize=(width or max(3.3 * columns, 5.0), height or 3.2 * rows),
    layout="constrained", dpi=150,
  )
  return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def method_styles(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
  """Colour by kind, marker by D; another marker and line where else they differ."""
  methods = rows.sort_values("order").drop_duplicates("method")
  seen: dict[tuple, int] = {}
  styles = {}
  for _, row in methods.iterrows():
    key = (row["kind"], row["depth"])
    index = seen[key] = seen.get(key, -1) + 1
    styles[row["method"]] = {
      "color": COLOURS[row["kind"]],
      "marker": _VARIANTS[(index - 1) % 8] if index else marker(row["depth"]),
      "linestyle": LINES[index % len(LINES)],
    }
  return styles


def marker(depth: int) -> str:
  return _MARKERS.get(depth, "h")


def series_marker(index: int) -> str:
  """Returns the marker of a series that is not told by its depth."""
  return _SERIES[index % len(_SERIES)]


def series_style(index: int, is_hollow: bool = False) -> dict[str, Any]:
  """Returns colour, marker and line of a series that is told by none of its own."""
  colour = list(COLOURS.values())[index % len(COLOURS)]
  return {
    "color": colour, "marker": series_marker(index),
    "linestyle": LINES[index % len(LINES)],
    "markerfacecolor": "white" if is_hollow else colour,
  }


def share_axis(ax: Axes) -> None:
  """Shows shares from 0 to 1, whatever the data; only markers stick out."""
  ax.set_ylim(-0.03, 1.03)
  ax.yaxis.set_major_locator(FixedLocator(np.linspace(0, 1, 6)))


def zero_line(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
  """Marks 0 on an axis, if it lies within what is drawn; to be called last."""
  low, high = sorted(ax.get_ylim() if axis == "y" else ax.get_xlim())
  if low <= 0 <= high:
    (ax.axhline if axis == "y" else ax.axvline)(0, **_ZERO)


def level_lines(ax: Axes, rows: pd.DataFrame, styles: dict[str, Any]) -> None:
  lines = _in_order(rows)
  for index, (method, line) in enumerate(lines):
    ax.errorbar(
      _beside(line["size"], index, len(lines)), line["mean"], yerr=error_bars(line),
      capsize=3, label=method, **styles[method],
    )


def gain_lines(ax: Axes, rows: pd.DataFrame, styles: dict[str, Any]) -> None:
  """Gains with intervals, side by side where sizes coincide; bounds get an arrow."""
  lines = _in_order(rows)
  for index, (method, line) in enumerate(lines):
    x = _beside(line["size"], index, len(lines))
    style = dict(styles[method], linestyle="none")
    exact = (line["bound"] == "").to_numpy()
    ax.errorbar(
      x[exact], line.loc[exact, "mean"], yerr=error_bars(line[exact]), capsize=3,
      label=method, **style,
    )
    for position, (_, row) in zip(x[~exact], line[~exact].iterrows(), strict=True):
      _bound(ax, (position, row["mean"]), (0, 16), row["bound"], style)
  ax.margins(y=0.12)
  zero_line(ax)


def forest(columns: dict[str, pd.DataFrame], zero: bool) -> Figure:
  """Draws one panel per entry: a row for each method, its mean and interval."""
  everything = pd.concat(columns.values()).sort_values("order")
  methods = list(everything["method"].unique())
  figure, axes = panels(
    1, len(columns), height=1.2 + 0.32 * len(methods), sharey=True, sharex=zero
  )
  styles = method_styles(everything)
  for ax, (label, rows) in zip(axes.flat, columns.items(), strict=True):
    for _, row in rows.iterrows():
      style = dict(styles[row["method"]], linestyle="none")
      place = methods.index(row["method"])
      if row.get("bound", ""):
        _bound(ax, (row["mean"], place), (16, 0), row["bound"], style)
      else:
        ax.errorbar(
          row["mean"], place, xerr=error_bars(pd.DataFrame([row])), capsize=3, **style
        )
    if zero:
      zero_line(ax, "x")
    ax.set_xlabel(textwrap.fill(label, 24))  # Narrower than a panel.
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5))
  return figure


def _bound(
  ax: Axes, at: tuple[float, float], step: tuple[int, int], bound: str,
  style: dict[str, Any],
) -> None:
  """A hollow marker with an arrow to the side where the value may lie."""
  sign = -1 if bound == UPPER else 1
  ax.plot(*at, **dict(style, fillstyle="none"))
  ax.annotate(
    "", at, (sign * step[0], sign * step[1]), textcoords="offset points",
    arrowprops=dict(arrowstyle="<-", color=style["color"]),
  )


def fitted_lines(
  ax: Axes, slopes: pd.DataFrame, comparison: str, rows: pd.DataFrame,
  styles: dict[str, Any],
) -> None:
  chosen = slopes[
    (slopes["metric"] == "main_loss") & (slopes["comparison"] == comparison)
  ]
  for _, fit in chosen.iterrows():
    own = rows[(rows["method"] == fit["method"]) & (rows["bound"] == "")]
    x = np.array([own["size"].min(), own["size"].max()], float)
    style = styles[fit["method"]]
    ax.plot(
      x, fit["slope"] * np.log10(x) + fit["intercept"], color=style["color"],
      linestyle=style["linestyle"], linewidth=0.8,
    )


def _beside(sizes: pd.Series, index: int, count: int) -> pd.Series:
  """The sizes, moved a little so that error bars stand side by side."""
  return sizes * 1.03 ** (index - (count - 1) / 2)


def _in_order(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
  rows = rows.sort_values(["order", "size"])
  return [(m, line) for m, line in rows.groupby("method", sort=False)]


def error_bars(rows: pd.DataFrame) -> np.ndarray:
  """Distances from the mean to the ends, [2, rows]; 0 where there is no interval."""
  below = (rows["mean"] - rows["low"]).fillna(0.0)
  above = (rows["high"] - rows["mean"]).fillna(0.0)
  return np.stack([below, above])


def size_axis(
  ax: Axes, sizes: pd.Series, label: str = "parameters of the NTP model"
) -> None:
  ax.set_xscale("log")
  low, high = sizes.min(), sizes.max()
  pad = max((high / low) ** 0.08, 1.15)
  ax.set_xlim(low / pad, high * pad)
  ticks = sorted(set(sizes))
  is_crowded = any(b / a < 1.6 for a, b in itertools.pairwise(ticks))
  if len(ticks) > 6 or is_crowded or high / low > 1e4:
    ax.xaxis.set_major_locator(LogLocator())
  else:
    ax.xaxis.set_major_locator(FixedLocator(ticks))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(x)))
  ax.set_xlabel(label)


def log_axis(ax: Axes, words: Callable[[float], str]) -> None:
  """Marks 1, 2 and 5 of every decade of a logarithmic x axis, in these words."""
  ax.set_xscale("log")
  ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words(x)))
  ax.xaxis.set_minor_locator(NullLocator())


def legend_below(figure: Figure, axes: Any) -> None:
  """One legend for all panels: every label once, in the order of appearance."""
  entries: dict[str, Any] = {}
  for ax in axes:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      entries.setdefault(label, handle)
  width = figure.get_figwidth()
  longest = max(map(len, entries), default=1)
  columns = max(1, min(len(entries), int(width / (0.5 + 0.075 * longest))))
  figure.legend(
    entries.values(), entries.keys(), loc="outside lower center", ncols=columns
  )
