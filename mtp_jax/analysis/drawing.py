"""How a figure of the report looks: colours, markers, lines, bars, axes, legends.

Colour is the kind of predictor, the marker is D; another marker and line style tell
further variants of the same kind and D apart. A hollow marker with an arrow is a bound.
All text has one size.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from mtp_jax.analysis.gains import EXACT, UPPER
from mtp_jax.analysis.ladders import size_text
from mtp_jax.predictors import KINDS

# Okabe and Ito (2008): distinct colours with every common kind of colour blindness.
_PALETTE = (
  "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
)
COLOURS = dict(zip(KINDS, itertools.cycle(_PALETTE), strict=False))
LINES = ("-", "--", ":", "-.")
_MARKERS = {0: "o", 1: "s", 2: "^", 3: "D", 4: "v", 5: "P", 6: "X", 7: "*"}
# Further variants have no marker of a depth.
_VARIANTS = "hpd<>8HX"
_SERIES = "os^DvPX*"
# Inches. A page shows figures about 800 pixels wide: text of 9 points has 12 of them.
WIDEST = 8.0
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
  """Returns a figure and its axes [rows, columns]; sizes in inches."""
  width = min(width or max(3.3 * columns, 5.0), WIDEST)
  figure = Figure(
    figsize=(width, height or 3.2 * rows),
    layout="constrained", dpi=150,
  )
  return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def method_styles(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
  """Returns colour by kind and marker by D; variants differ in marker and line."""
  methods = rows.sort_values("order").drop_duplicates("method")
  variant = methods.groupby(["kind", "depth"]).cumcount()
  return {
    row["method"]: {
      "color": COLOURS[row["kind"]],
      "marker": _VARIANTS[(index - 1) % 8] if index else marker(row["depth"]),
      "linestyle": LINES[index % len(LINES)],
    }
    for (_, row), index in zip(methods.iterrows(), variant, strict=True)
  }


def marker(depth: int) -> str:
  return _MARKERS.get(depth, "h")


def series_marker(index: int) -> str:
  """Returns the marker of a series whose marker is not its depth's."""
  return _SERIES[index % len(_SERIES)]


def series_style(index: int, is_hollow: bool = False) -> dict[str, Any]:
  """Returns colour, marker and line of a series by its place in the legend."""
  colour = _PALETTE[index % len(_PALETTE)]
  return {
    "color": colour, "marker": series_marker(index),
    "linestyle": LINES[index % len(LINES)],
    "markerfacecolor": "white" if is_hollow else colour,
  }


def size_lines(
  ax: Axes, rows: pd.DataFrame, styles: dict[str, Any], is_joined: bool = True
) -> None:
  """Draws mean and interval against size, one method a line, side by side.

  Rows with a `bound` get a hollow marker with an arrow to where the value may lie.
  """
  lines = list(rows.sort_values(["order", "size"]).groupby("method", sort=False))
  for index, (method, line) in enumerate(lines):
    style = styles[method] | ({} if is_joined else {"linestyle": "none"})
    # A few points apart, whatever the axis: intervals at one place stay legible.
    aside = ax.transData + ScaledTranslation(
      4 * (index - (len(lines) - 1) / 2) / 72, 0, ax.figure.dpi_scale_trans
    )
    is_exact = line["bound"] == EXACT if "bound" in line else line["size"] > 0
    exact = line[is_exact]
    ax.errorbar(
      exact["size"], exact["mean"], yerr=error_bars(exact), capsize=3, label=method,
      transform=aside, **style,
    )
    for _, row in line[~is_exact].iterrows():
      ax.plot(
        row["size"], row["mean"], transform=aside, **style | {"fillstyle": "none"}
      )
      ax.annotate(
        "", (row["size"], row["mean"]), (0, -16 if row["bound"] == UPPER else 16),
        xycoords=aside, textcoords="offset points",
        arrowprops=dict(arrowstyle="<-", color=style["color"]),
      )
    # Points drawn aside do not count for the limits of the axes.
    ends = line.melt("size", ["mean", "low", "high"]).dropna()
    ax.update_datalim(ends[["size", "value"]].to_numpy(float))
  ax.autoscale_view()


def error_bars(rows: pd.DataFrame) -> np.ndarray:
  """Returns distances from the mean to the ends [2, rows]; 0 without an interval."""
  below = (rows["mean"] - rows["low"]).fillna(0.0)
  above = (rows["high"] - rows["mean"]).fillna(0.0)
  return np.stack([below, above])


def share_axis(ax: Axes) -> None:
  """Shows shares from 0 to 1, whatever the data; only markers stick out."""
  ax.set_ylim(-0.03, 1.03)
  ax.yaxis.set_major_locator(FixedLocator(np.linspace(0, 1, 6)))


def zero_line(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
  """Marks 0 on an axis, if it lies within what is drawn; to be called last."""
  low, high = sorted(ax.get_ylim() if axis == "y" else ax.get_xlim())
  if low <= 0 <= high:
    (ax.axhline if axis == "y" else ax.axvline)(0, color="#777777", linewidth=0.8)


def size_axis(
  ax: Axes, sizes: pd.Series, label: str = "parameters of NTP"
) -> None:
  """Makes x a logarithmic axis of sizes, with a tick a size where there is room."""
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
  """Marks a logarithmic x axis that is drawn on, in these words.

  Marks 1, 2 and 5 of each of up to two decades; more decades have room for 1 alone.
  """
  ax.set_xscale("log")
  low, high = ax.dataLim.intervalx
  ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 100 * low else (1,)))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words(x)))
  ax.xaxis.set_minor_locator(NullLocator())


def value_axis(ax: Axes, values: pd.Series) -> None:
  """Marks on the x axis the values that were tried, and no others."""
  ax.xaxis.set_major_locator(FixedLocator(sorted(values.unique())))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  ax.xaxis.set_minor_locator(NullLocator())


def legend_below(figure: Figure, axes: Any) -> None:
  """Draws one legend for all panels: every label once, in the order of appearance."""
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
