"""Tax and gain against size on one page: what MTP costs, and where it pays.

The tax is what extra losses cost in next-token loss on text; the gain is what they
bring where the tokens ahead must be planned (siblings, star graphs). Intervals are over
seeds. Published points are hollow and grey; nothing is fitted to them.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mtp_jax.analysis import drawing
from mtp_jax.analysis.claims import by_size, look_ahead, siblings, tax
from mtp_jax.analysis.claims.claim import Drawing
from mtp_jax.analysis.published import published_taxes
from mtp_jax.analysis.results import Results

_FARTHEST = 1.3e9  # Of the extrapolation.
# {experiment: (title, its series, label of the axis)}
_PARTS = {
  "tax": (
    "Tax on text", tax.series, "main loss minus NTP's, nats\n(above 0: MTP costs)"
  ),
  "siblings": (
    "Gain on siblings", siblings.series,
    "held-out loss, NTP's minus n = 2's, nats\n(above 0: MTP pays)",
  ),
  "look_ahead": (
    "Gain on star graphs", look_ahead.series,
    "ln(tokens) saved until solved\n(above 0: MTP pays)",
  ),
}


def draw(results: dict[str, Results]) -> Drawing | None:
  """Returns the figure and its numbers from the kept tables that there are.

  results: of `tax`, `siblings` and `look_ahead`, any of them. A table without a pair of
  finished trials has no panel; without any panel there is no figure.
  """
  shown = {
    name: series(results[name])
    for name, (_, series, _) in _PARTS.items() if name in results
  }
  shown = {name: own for name, own in shown.items() if len(own[0])}
  if not shown:
    return None
  figure, axes = drawing.panels(1, len(shown), width=5.6 * len(shown), height=7.0)
  tables = []
  for ax, (name, own) in zip(axes.flat, shown.items(), strict=True):
    title, _, ylabel = _PARTS[name]
    table = by_size.draw(ax, *own, ylabel).assign(source="measured here")
    if name == "tax":
      table = pd.concat([table, *_beside_taxes(ax, table)], ignore_index=True)
    tables.append(table.assign(shown=name))
    ax.set_title(title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
  return figure, pd.concat(tables, ignore_index=True)


def caption(numbers: pd.DataFrame) -> str:
  """Returns the caption of the figure that shows these numbers."""
  shown = set(numbers["shown"])
  parts = ["Tax and gain against size; bars are 95 % intervals over seeds."]
  if "tax" in shown:
    parts.append(
      "Tax: above 0 the extra losses cost. Hollow grey: published, not fitted, in nats "
      "of the source's own unit."
    )
  if "extrapolated" in set(numbers["source"]):
    parts.append(
      "Dotted: the power law of our n = 4 tax with its 95 % prediction interval."
    )
  if shown - {"tax"}:
    parts.append("Gain: above 0 the extra losses pay.")
  return " ".join(parts)


def _beside_taxes(ax: Axes, ours: pd.DataFrame) -> list[pd.DataFrame]:
  """Draws the published taxes and the power law of ours; returns their numbers."""
  tables = [published_taxes()]
  published = tables[0]
  for index, (source, rows) in enumerate(published.groupby("source", sort=False)):
    ax.errorbar(
      rows["size"], rows["mean"], yerr=drawing.error_bars(rows), color="#666666",
      capsize=3, marker=drawing.series_marker(index), markerfacecolor="white",
      linestyle="none", label=f"published, not fitted: {source}",
    )
  law = f"{tax.ARMS['n4'][1]}, fresh"
  points = ours[ours["series"] == law]
  if len(points) > 2 and (points["mean"] > 0).all():
    at = np.geomspace(points["size"].min(), _FARTHEST, 50)
    line = tax.prediction(points["size"].to_numpy(), points["mean"].to_numpy(), at)
    colour = drawing.series_style(2)["color"]
    ax.plot(at, line["mean"], linestyle=":", color=colour)
    ax.fill_between(at, line["low"], line["high"], color=colour, alpha=0.12)
    tables.append(line.assign(source="extrapolated", series=law))
  # The wide interval of the law must not flatten what was measured.
  drawn = pd.concat([ours, published])[["mean", "low", "high"]].stack()
  ax.set_ylim(min(drawn.min(), -0.05) - 0.02, drawn.max() + 0.02)
  drawing.size_axis(ax, pd.concat([ours["size"], published["size"]]), "parameters")
  return tables
