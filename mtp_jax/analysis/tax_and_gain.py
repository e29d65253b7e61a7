"""Tax and gain against size on one page: a figure, its caption, a sentence.

The tax is what extra losses cost in next-token loss on text; the gain is what they
bring where the tokens ahead must be planned (siblings, star graphs). Intervals are over
seeds. Published points are hollow and grey; nothing is fitted to them.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mtp_jax.analysis import drawing, ladders
from mtp_jax.analysis.claims import by_size, claim, look_ahead, siblings, tax
from mtp_jax.analysis.gains import EXACT, TOKENS, Analysis
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.published import published_taxes
from mtp_jax.analysis.results import Results
from mtp_jax.sections import TASKS

# Four tokens at once, in kept results and in a folder of runs.
_LAWS = (f"{tax.ARMS['n4'][1]}, fresh", "parallel D=3")
_FARTHEST = 1.3e9  # Of the extrapolation.


@dataclasses.dataclass(frozen=True)
class Part:
  """One panel: gains against size, and the words for them.

  measured: what the gains are differences of. is_cost: the `gain` is the tax, MTP minus
  NTP. series: returns the gains of kept results.
  """

  title: str
  data: str
  ylabel: str
  measured: str
  unit: str
  margin: claim.Margin
  per_decade: claim.Margin
  series: Callable[[Results], by_size.Series]
  is_cost: bool = False


_LOSS = ("the next-token loss", "nats")
_SIBLINGS = siblings.SCORES["loss"]
PARTS = {
  "tax": Part(
    "Tax on text", "text", "main loss minus NTP's, nats\n(above 0: MTP costs)", *_LOSS,
    claim.NATS, claim.NATS_PER_DECADE, tax.series, is_cost=True,
  ),
  "siblings": Part(
    "Gain on siblings", "siblings",
    "held-out loss, NTP's minus n = 2's, nats\n(above 0: MTP pays)", *_LOSS,
    _SIBLINGS.margin, _SIBLINGS.per_decade, siblings.series,
  ),
  "look_ahead": Part(
    "Gain on star graphs", "star graphs",
    "ln(tokens) saved until solved\n(above 0: MTP pays)", "the tokens until solved",
    "in ln", claim.FACTOR, claim.FACTOR_PER_DECADE, look_ahead.series,
  ),
}
# The task whose trials a part reads in a folder of runs.
SOURCES = {"siblings": "siblings", "look_ahead": "star_graph"}


@dataclasses.dataclass(frozen=True)
class Panel:
  """A part with its gains: columns size, REPLICATE, gain, series, and group.

  The sentence has a clause a group; without that column each series is a group.
  """

  name: str
  part: Part
  pairs: pd.DataFrame
  styles: dict


def of_results(results: dict[str, Results]) -> list[Panel]:
  """Returns a panel for each of `PARTS` that has a pair of finished trials."""
  shown = [
    (name, part, *part.series(results[name]))
    for name, part in PARTS.items() if name in results
  ]
  return [Panel(*own) for own in shown if len(own[2])]


def of_ladders(analysis: Analysis, labels: Sequence[str]) -> list[Panel]:
  """Returns a panel for the text of these ladders, and one for each task."""
  pairs = analysis.pairs[analysis.pairs["ladder"].isin(labels)]
  is_main = (pairs["metric"] == "main_loss") & (pairs["comparison"] == TOKENS)
  pairs = pairs[is_main & (pairs["bound"] == EXACT)].sort_values(["order", "ladder"])
  sources = ladders.sources(analysis.trials)
  task = pairs["ladder"].map(sources).where(lambda x: x.isin(TASKS), "")
  panels = []
  for name, own in pairs.groupby(task):
    several = own["ladder"].nunique() > 1
    series = own["method"] + (", " + own["ladder"] if several else "")
    part = PARTS["siblings" if name else "tax"]
    if name:
      part = dataclasses.replace(
        part, title=f"Gain on {name}", data=name,
        ylabel="main loss, NTP's minus MTP's, nats\n(above 0: MTP pays)",
      )
    looks = drawing.method_styles(own)
    styles = looks if not several else {
      x: drawing.series_style(index) for index, x in enumerate(series.unique())
    }
    own = own.assign(gain=(-1 if part.is_cost else 1) * own["gain"], series=series)
    own = own.rename(columns={"data_seed": "data.seed"})
    panels.append(Panel(name or "tax", part, own, styles))
  return panels


def draw(panels: Sequence[Panel]) -> claim.Drawing | None:
  """Returns the figure and its numbers; without a panel there is none."""
  if not panels:
    return None
  columns = min(len(panels), 2)
  rows = -(-len(panels) // columns)
  figure, axes = drawing.panels(rows, columns, width=4.2 * columns, height=5.4 * rows)
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  tables = []
  for ax, panel in zip(axes.flat, panels, strict=False):
    table = by_size.draw(ax, panel.pairs, panel.styles, panel.part.ylabel)
    table = table.assign(source="measured here")
    if panel.name == "tax":
      beside = _beside_taxes(ax, table, panel.styles)
      table = pd.concat([table, *beside], ignore_index=True)
    tables.append(table.assign(shown=panel.name))
    ax.set_title(panel.part.title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=1)
  return figure, pd.concat(tables, ignore_index=True)


def caption(numbers: pd.DataFrame, interim: str = "") -> str:
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
  return " ".join([*parts, *([f"Interim: {interim}."] if interim else [])])


def sentence(panels: Sequence[Panel]) -> str:
  """Returns what the panels show, in one sentence.

  The effect of a group is the mean over its sizes and series, its trend the slope that
  its series share; both are judged by the margins of the part.
  """
  clauses = "; ".join(_clause(panel) for panel in panels)
  return f"{clauses[:1].upper()}{clauses[1:]}."


def _clause(panel: Panel) -> str:
  pairs, part = panel.pairs, panel.part
  groups = pairs["group"] if "group" in pairs else pairs["series"]
  words: dict[str, list[str]] = {}
  own = {group: pairs[groups == group] for group in groups.unique()}
  for group, rows in own.items():
    # Numbers of more than three methods are left to the table.
    words.setdefault(_effect(part, rows, len(own) <= 3), []).append(group)
  effects = [f"{', '.join(names)} {effect}" for effect, names in words.items()]
  ends = pairs["size"].agg(["min", "max"]).map(size_text)
  sizes = " to ".join(ends.unique())
  return f"on {part.data} at {sizes} parameters {', '.join(effects)}"


def _effect(part: Part, pairs: pd.DataFrame, with_numbers: bool) -> str:
  (mean,) = by_size.average(pairs, "", apart=["series"]).at(part.margin).estimates
  verb = "raised" if (mean.mean > 0) == part.is_cost else "lowered"
  by = f" by {abs(mean.mean):.2g} {part.unit}"
  if np.isnan(mean.low):
    by = by if with_numbers else ""
    return f"{verb} {part.measured}{by} (one seed, so without an interval)"
  if mean.verdict == claim.EQUIVALENT:
    words = f"changed {part.measured} by less than {part.margin.value:.2g} {part.unit}"
  elif mean.verdict == claim.UNDECIDED:
    words = f"showed no effect on {part.measured}"
  else:
    ends = sorted((abs(mean.low), abs(mean.high)))
    by += f" [{ends[0]:.2g}, {ends[1]:.2g}]"
    words = f"{verb} {part.measured}{by if with_numbers else ''}"
  over = by_size.slope(pairs, ["series"])
  if over is None:
    return words
  verdict = claim.Finding((claim.estimate(over),)).at(part.per_decade).verdict
  if verdict == claim.EQUIVALENT:
    return f"{words} (the same at every size)"
  if verdict == claim.UNDECIDED:
    trend = "undecided whether larger models differ"
  else:
    is_more = (over["mean"] > 0) == (mean.mean > 0)
    trend = f"{'more' if is_more else 'less'} in larger models"
  number = ": {mean:+.2g} [{low:+.2g}, {high:+.2g}] per tenfold".format(**over)
  return f"{words} ({trend}{number if with_numbers else ''})"


def _beside_taxes(ax: Axes, ours: pd.DataFrame, styles: dict) -> list[pd.DataFrame]:
  """Draws the published taxes and the power law of ours; returns their numbers."""
  tables = [published_taxes()]
  published = tables[0]
  for index, (source, rows) in enumerate(published.groupby("source", sort=False)):
    ax.errorbar(
      rows["size"], rows["mean"], yerr=drawing.error_bars(rows), color="#666666",
      capsize=3, marker=drawing.series_marker(index), markerfacecolor="white",
      linestyle="none",
      label=textwrap.fill(f"published, not fitted: {source}", 48),
    )
  points = ours[ours["series"].isin(_LAWS)]
  if len(points) > 2 and (points["mean"] > 0).all():
    at = np.geomspace(points["size"].min(), _FARTHEST, 50)
    line = tax.prediction(points["size"].to_numpy(), points["mean"].to_numpy(), at)
    colour = styles[points["series"].iloc[0]]["color"]
    ax.plot(at, line["mean"], linestyle=":", color=colour)
    ax.fill_between(at, line["low"], line["high"], color=colour, alpha=0.12)
    tables.append(line.assign(source="extrapolated", series=points["series"].iloc[0]))
  # The wide interval of the law must not flatten what was measured.
  drawn = pd.concat([ours, published])[["mean", "low", "high"]].stack()
  ax.set_ylim(min(drawn.min(), -0.05) - 0.02, drawn.max() + 0.02)
  drawing.size_axis(ax, pd.concat([ours["size"], published["size"]]), "parameters")
  return tables
