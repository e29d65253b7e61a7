"""How the pictures of claims are drawn: one dot a seed, or a line over an axis.

Colour is the kind of predictor, the marker is D, as in the report of a ladder.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from mtp_jax.analysis import drawing
from mtp_jax.analysis.claims import arms
from mtp_jax.analysis.claims.claim import Drawing
from mtp_jax.analysis.drawing import COLOURS, LINES, error_bars, marker
from mtp_jax.analysis.statistics import interval

DASHED = dict(color="#777777", linewidth=0.8, linestyle="--")


def with_method(rows: pd.DataFrame) -> pd.DataFrame:
  """Adds column `method`; NTP first, then by kind and D."""
  order = {kind: index for index, kind in enumerate(COLOURS)}
  rows = rows.assign(
    method=[
      arms.label(*x) for x in zip(rows["mtp.kind"], rows["mtp.depth"], strict=True)
    ],
    order=rows["mtp.kind"].map(order),
  )
  return rows.sort_values(["order", "mtp.depth"], kind="stable").reset_index(drop=True)


def style(row: pd.Series) -> dict[str, Any]:
  return {"color": COLOURS[row["mtp.kind"]], "marker": marker(row["mtp.depth"])}


def dots(ax: Axes, rows: pd.DataFrame) -> None:
  """Draws a dot a seed for each method, beside their mean and interval."""
  methods = list(rows["method"].unique())
  for place, method in enumerate(methods):
    own = rows[rows["method"] == method]
    spread = np.linspace(-0.18, 0.18, len(own)) if len(own) > 1 else np.zeros(1)
    ax.scatter(
      place + spread, own["value"], s=18, alpha=0.7, linewidths=0, **style(own.iloc[0])
    )
    over = pd.DataFrame([interval(own["value"])])
    ax.errorbar(
      place + 0.3, over["mean"], yerr=error_bars(over), capsize=3, **style(own.iloc[0])
    )
  ax.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
  ax.set_xlim(-0.4, len(methods) - 0.4)


def lines(
  ax: Axes,
  rows: pd.DataFrame,
  x: str,
  keys: Sequence[str],
  styles: dict[tuple, dict[str, Any]] | None = None,
) -> pd.DataFrame:
  """Draws mean and interval over seeds against `x`, a line for each value of the keys.

  Without styles the first key is the method: colour and marker are its own. The line
  tells methods of one kind apart or, with the filling of the marker, the values of a
  second key. Returns the numbers drawn.
  """
  table = []
  groups = list(rows.dropna(subset="value").groupby(list(keys), sort=False))
  seconds = list(dict.fromkeys(key[1:] for key, _ in groups))
  of_kind: dict[str, int] = {}
  for index, (key, own) in enumerate(groups):
    second = seconds.index(key[1:])
    kind = "" if styles else own["mtp.kind"].iloc[0]
    place = of_kind[kind] = of_kind.get(kind, -1) + 1
    look = styles[key] if styles else style(own.iloc[0]) | {
      "linestyle": LINES[(second if len(seconds) > 1 else place) % len(LINES)],
      "markerfacecolor": "white" if second % 2 else COLOURS[kind],
    }
    line = pd.DataFrame({at: interval(y) for at, y in own.groupby(x)["value"]}).T
    # A few points apart, whatever the axis: intervals at one place stay legible.
    aside = ScaledTranslation(
      4 * (index - (len(groups) - 1) / 2) / 72, 0, ax.figure.dpi_scale_trans
    )
    ax.errorbar(
      line.index, line["mean"], yerr=error_bars(line), capsize=3,
      label=", ".join(map(str, key)), transform=ax.transData + aside, **look,
    )
    # Points drawn aside do not count for the limits of the axes.
    ends = line[["mean", "low", "high"]].stack()
    ax.update_datalim(np.column_stack([ends.index.get_level_values(0), ends]))
    labels = dict(zip(keys, key, strict=True))
    table.append(line.rename_axis(x).reset_index().assign(**labels))
  ax.autoscale_view()
  return pd.concat(table, ignore_index=True) if table else rows


def line_picture(
  rows: pd.DataFrame, x: str, keys: Sequence[str] = ("method",),
  styles: dict[tuple, dict[str, Any]] | None = None, is_share: bool = False,
  **axis: Any,
) -> Drawing:
  """Returns one panel of `lines`; shares from 0 to 1, anything else with a line at 0.

  axis: of `Axes.set`. The x axis is logarithmic for sizes, else has a tick a value.
  """
  figure, axes = drawing.panels(1, 1, width=5.5)
  ax = axes[0, 0]
  ax.set_xscale(axis.pop("xscale", "linear"))
  table = lines(ax, rows, x, keys, styles)
  if x == "size":
    drawing.size_axis(ax, rows[x])
  elif ax.get_xscale() == "linear":
    ax.set_xticks(sorted(rows[x].unique()))
  (drawing.share_axis if is_share else drawing.zero_line)(ax)
  ax.set(**axis)
  drawing.legend_below(figure, axes.flat)
  return figure, table
