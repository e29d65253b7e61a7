"""Tax and gain against size on one page: what MTP costs, and where it pays.

Left: what extra losses cost in next-token loss on text. Right: what they gain where the
tokens ahead must be planned (siblings, star graphs). Intervals are over seeds.
Published points are hollow and grey; nothing is fitted to them.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mtp_jax.analysis.claims import look_ahead, siblings, tax
from mtp_jax.analysis.claims.claim import Drawing
from mtp_jax.analysis.drawing import (
  error_bars,
  panels,
  series_marker,
  series_style,
  size_axis,
  zero_line,
)
from mtp_jax.analysis.published import published_taxes
from mtp_jax.analysis.results import Results

CAPTION = (
  "Tax and gain against size; bars are 95 % intervals over seeds. Above 0 the extra "
  "losses cost on the left and pay on the right. Hollow grey: published, not fitted, "
  "in nats of the source's own unit. Dotted: the power law of our n = 4 tax with its "
  "95 % prediction interval."
)
_FARTHEST = 1.3e9  # Of the extrapolation.


def draw(results: dict[str, Results]) -> Drawing | None:
  """Returns the figure and its numbers from the kept tables that there are.

  results: of `tax`, `siblings` and `look_ahead`, any of them. None without any.
  """
  parts = {
    "tax": ("Tax on text", _tax), "siblings": ("Gain on siblings", _siblings),
    "look_ahead": ("Gain on star graphs", _look_ahead),
  }
  shown = [name for name in parts if name in results]
  if not shown:
    return None
  figure, axes = panels(
    1, len(shown), width=5.6 * len(shown), height=7.0
  )
  tables = []
  for ax, name in zip(axes.flat, shown, strict=True):
    title, draw_part = parts[name]
    tables.append(draw_part(ax, results[name]).assign(shown=name))
    ax.set_title(title)
    zero_line(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
  return figure, pd.concat(tables, ignore_index=True)


def _tax(ax: Axes, results: Results) -> pd.DataFrame:
  ours = tax.draw_taxes(ax, results)
  tables = [ours.assign(source="measured here")]
  points = ours[(ours["method"] == tax.ARMS["n4"][1]) & (ours["regime"] == "fresh")]
  if len(points) > 2 and (points["mean"] > 0).all():
    at = np.geomspace(points["size"].min(), _FARTHEST, 50)
    line = tax.prediction(points["size"].to_numpy(), points["mean"].to_numpy(), at)
    limits = ax.get_ylim()
    colour = series_style(2)["color"]
    ax.plot(at, line["mean"], linestyle=":", color=colour)
    ax.fill_between(at, line["low"], line["high"], color=colour, alpha=0.12)
    ax.set_ylim(limits)  # A wide interval must not flatten what was measured.
    tables.append(line.assign(source="extrapolated", method=tax.ARMS["n4"][1]))
  published = published_taxes()
  for index, (source, rows) in enumerate(published.groupby("source", sort=False)):
    ax.errorbar(
      rows["size"], rows["mean"], yerr=error_bars(rows), color="#666666", capsize=3,
      marker=series_marker(index), markerfacecolor="white", linestyle="none",
      label=f"published, not fitted: {source}",
    )
  tables.append(published)
  low, high = (
    f(table[end].min() if f is min else table[end].max() for table in (ours, published))
    for f, end in ((min, "mean"), (max, "mean"))
  )
  ends = [ours["low"].min(), ours["high"].max()]
  low, high = np.nanmin([low, ends[0], -0.05]), np.nanmax([high, ends[1]])
  ax.set_ylim(low - 0.02, high + 0.02)
  size_axis(ax, pd.concat([ours["size"], published["size"]]), "parameters")
  ax.set_ylabel("main loss minus NTP's, nats\n(above 0: MTP costs)")
  return pd.concat(tables, ignore_index=True)


def _siblings(ax: Axes, results: Results) -> pd.DataFrame:
  pairs = siblings.gains(results, "loss")
  table = siblings.draw_gains(ax, pairs[pairs["mtp.weight"] == siblings.WEIGHT])
  ax.set_ylabel("held-out loss, NTP's minus n = 2's, nats\n(above 0: MTP pays)")
  return table


def _look_ahead(ax: Axes, results: Results) -> pd.DataFrame:
  table = look_ahead.draw_gains(ax, look_ahead.ladder(results))
  ax.set_ylabel("ln(tokens) saved until solved\n(above 0: MTP pays)")
  return table
