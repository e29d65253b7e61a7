"""The figures of the report, each with the table of the numbers that it shows.

Every function takes one ladder's `Analysis` and returns `(Figure, DataFrame)`, or None
where the ladder has nothing to show. Error bars are 95 % t intervals over seeds and are
left out where there is one seed.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtp_jax.analysis.drawing import (
  COLOURS,
  LINES,
  STYLE,
  error_bars,
  legend_below,
  log_axis,
  method_styles,
  panels,
  series_marker,
  share_axis,
  size_axis,
  size_lines,
  value_axis,
  zero_line,
)
from mtp_jax.analysis.gains import COMPARISONS, TOKENS, Analysis
from mtp_jax.analysis.ladders import size_text

Drawing = tuple[Figure, pd.DataFrame] | None


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of the report: file stem, heading, caption and how it is drawn."""

  stem: str
  title: str
  caption: str
  draw: Callable[[Analysis], Drawing]


@dataclasses.dataclass(frozen=True)
class Panel:
  """One metric of one depth against size."""

  metric: str
  title: str = ""
  ylabel: str = ""
  at_depth: int = 0
  is_share: bool = False


def _main(table: pd.DataFrame) -> pd.DataFrame:
  return table[table["metric"] == "main_loss"]


def gain_vs_size(ladder: Analysis) -> Drawing:
  gains = _main(ladder.gains)
  if not len(gains):
    return None
  figure, axes = panels(1, 3, sharey=True)
  styles = method_styles(gains)
  for ax, comparison in zip(axes.flat, COMPARISONS, strict=True):
    rows = gains[gains["comparison"] == comparison]
    size_lines(ax, rows, styles, is_joined=False)
    ax.margins(y=0.12)
    zero_line(ax)
    ax.set_title(f"equal {comparison}")
    size_axis(ax, gains["size"])
  axes.flat[0].set_ylabel("gain over NTP, nats per token\n(above 0: MTP is better)")
  legend_below(figure, axes.flat)
  return figure, gains


def _levels(ladder: Analysis, metrics: Sequence[str]) -> pd.DataFrame:
  levels = ladder.levels
  return levels[levels["metric"].isin(metrics) & (levels["arm"] != "flops")]


def _grid(rows: pd.DataFrame, grid: list[list[Panel]], **how) -> Drawing:
  """Draws each panel's metric against size, mean and interval over seeds."""
  if not len(rows):
    return None
  figure, axes = panels(len(grid), len(grid[0]), **how)
  styles = method_styles(rows)
  for row_axes, row in zip(axes, grid, strict=True):
    for ax, panel in zip(row_axes, row, strict=True):
      is_own = rows["metric"] == panel.metric
      size_lines(ax, rows[is_own & (rows["at_depth"] == panel.at_depth)], styles)
      ax.set(title=textwrap.fill(panel.title, 24), ylabel=panel.ylabel)
      if panel.is_share:
        share_axis(ax)
  for ax in axes[-1]:
    size_axis(ax, rows["size"])
  legend_below(figure, axes.flat)
  return figure, rows


def loss_vs_size(ladder: Analysis) -> Drawing:
  units = {"main_loss": "nats per token", "bits_per_byte": "bits per byte"}
  grid = [Panel(x, ylabel=f"next-token loss, {unit}") for x, unit in units.items()]
  return _grid(_levels(ladder, list(units)), [grid])


def depth_losses(ladder: Analysis) -> Drawing:
  rows = _levels(ladder, ["depth_loss", "depth_accuracy"])
  names = {
    depth: f"depth {depth}" if depth else "next token (depth 0)"
    for depth in sorted(rows["at_depth"].unique())
  }
  losses = [Panel("depth_loss", name, "", depth) for depth, name in names.items()]
  shares = [Panel("depth_accuracy", "", "", depth, True) for depth in names]
  drawn = _grid(rows, [losses, shares], sharey="row", sharex=True, height=5.2)
  if drawn:
    axes = drawn[0].axes
    axes[0].set_ylabel("loss, nats per token")
    axes[len(names)].set_ylabel("accuracy")
  return drawn


def acceptance(ladder: Analysis) -> Drawing:
  lengths = {
    "sampled_tokens_per_round": "sampled: tokens per verification",
    "decoded_tokens_per_round": "greedy: tokens per verification",
    "simulated_accepted_length": "simulated accepted length",
  }
  shares = {
    "sampled_acceptance": "sampled: accepted",
    "decoded_acceptance": "greedy: accepted",
    "teacher_forced_agreement": "agreement with the trunk",
  }
  rows = _levels(ladder, [*lengths, *shares])
  rows = rows[rows["depth"] > 0]
  depths = sorted(rows.loc[rows["metric"].isin(shares), "at_depth"].unique())
  grid = [
    [Panel(length, lengths[length], "tokens")]
    + [
      Panel(share, f"{shares[share]}, depth {depth}", "share", depth, True)
      for depth in depths
    ]
    for length, share in zip(lengths, shares, strict=True)
  ]
  return _grid(rows, grid, sharex=True, height=7.6)


def generation(ladder: Analysis) -> Drawing:
  names = {
    "next_line_exact_match": "next line matches exactly",
    "function_parses": "completed function parses",
  }
  rows = _levels(ladder, list(names))
  grid = [
    Panel(metric, title, "share of prompts", 0, True)
    for metric, title in names.items() if (rows["metric"] == metric).any()
  ]
  return _grid(rows, [grid])


def _panel_a_size(
  rows: pd.DataFrame, xlabel: str, draw_panel: Callable[[Axes, pd.DataFrame], None]
) -> Drawing:
  """Draws the next-token loss of each size in a panel of its own, smallest first."""
  sizes = sorted(rows["size"].unique())
  columns = min(len(sizes), 3)
  figure, axes = panels(math.ceil(len(sizes) / columns), columns)
  for ax in axes.flat[len(sizes) :]:
    ax.remove()
  for ax, size in zip(axes.flat, sizes, strict=False):
    ax.set(title=f"{size_text(size)} parameters", xlabel=xlabel)
    draw_panel(ax, rows[rows["size"] == size])
  for row_axes in axes:
    row_axes[0].set_ylabel("next-token loss, nats per token")
  legend_below(figure, figure.axes)
  return figure, rows


def learning_rates(ladder: Analysis) -> Drawing:
  rows = ladder.rates[ladder.rates["arm"] != "flops"]
  tried = rows.groupby(["method", "size"])["learning_rate"].transform("size")
  rows = rows[(tried > 1) & np.isfinite(rows["mean"].astype(float))]
  if not len(rows):
    return None
  styles = method_styles(rows)

  def panel(ax: Axes, own: pd.DataFrame) -> None:
    for method, line in own.sort_values("learning_rate").groupby("method"):
      ax.plot(line["learning_rate"], line["mean"], label=method, **styles[method])
      used = line[line["chosen"]]
      ax.plot(
        used["learning_rate"], used["mean"], "o", markersize=11, fillstyle="none",
        color=styles[method]["color"],
      )
    ax.set_xscale("log")
    value_axis(ax, own["learning_rate"])
    ax.tick_params(axis="x", labelrotation=45)

  return _panel_a_size(rows, "peak learning rate", panel)


def curves(ladder: Analysis) -> Drawing:
  trials = ladder.trials[ladder.trials["chosen"] & (ladder.trials["arm"] != "flops")]
  rows = ladder.runs.curves.merge(trials, on="trial", suffixes=("", "_final"))
  validation, train = (rows[rows["split"] == x] for x in ("validation", "train"))
  rows = validation if len(validation) else train
  if not len(rows):
    return None
  keys = ["split", "size", "order", "method", "kind", "depth", "arm", "tokens"]
  rows = rows.groupby(keys, as_index=False).agg(
    loss=("loss", "mean"), bits_per_byte=("bits_per_byte", "mean"), n=("loss", "size")
  )
  styles = method_styles(rows)

  def panel(ax: Axes, own: pd.DataFrame) -> None:
    for method, line in own.groupby("method"):
      ax.plot(line["tokens"], line["loss"], label=method, **styles[method])
    log_axis(ax, size_text)

  return _panel_a_size(rows, "tokens", panel)


def setting_sweep(ladder: Analysis, setting: str, label: str) -> Drawing:
  """Draws the paired gain against one number of the mtp section, a panel a size."""
  rows = _families(ladder, setting)
  if rows is None:
    return None
  sizes = sorted(rows["size"].unique())
  figure, axes = panels(1, len(sizes), sharey=True)
  for ax, size in zip(axes.flat, sizes, strict=True):
    families = rows[rows["size"] == size].sort_values(setting).groupby("family")
    for index, (family, line) in enumerate(families):
      ax.errorbar(
        line[setting], line["mean"], yerr=error_bars(line), capsize=3, label=family,
        color=COLOURS[line["kind"].iloc[0]], linestyle=LINES[index % len(LINES)],
        marker=series_marker(index),
      )
    zero_line(ax)
    ax.set(title=f"{size_text(size)} parameters", xlabel=label)
    value_axis(ax, rows[setting])
  axes[0, 0].set_ylabel("gain over NTP, nats per token")
  legend_below(figure, axes.flat)
  return figure, rows


def _families(ladder: Analysis, setting: str) -> pd.DataFrame | None:
  """Returns gains of methods that agree in all but `setting`, if there are any.

  A family has two values of the setting or more, and the name of its first member
  without the number that varies.
  """
  trials = ladder.trials.drop_duplicates("method").set_index("method")
  rows = _main(ladder.gains)
  rows = rows[rows["comparison"] == TOKENS]
  own = rows["method"].map(trials["mtp"])
  blank = {"depth": 0, "weight": 0.0}[setting]
  rows = rows.assign(
    **{setting: [getattr(mtp, setting) for mtp in own]},
    key=[str(dataclasses.replace(mtp, **{setting: blank})) for mtp in own],
  )
  rows = rows[rows.groupby(["key", "size"])[setting].transform("nunique") > 1]
  if not len(rows):
    return None
  sign = {"depth": "D=", "weight": "λ="}[setting]
  first = rows.groupby("key")["method"].transform("first").str.split()
  rows["family"] = [" ".join(w for w in x if not w.startswith(sign)) for x in first]
  columns = ["size", setting, "n", "mean", "low", "high"]
  return rows[["ladder", "family", "method", "kind", *columns]]


PLOTS = (
  Plot(
    "gain_vs_size",
    "Gain over next-token prediction against size",
    "Paired differences of the next-token loss with the extra predictors deleted, NTP "
    "minus MTP: mean and 95 % t interval over pairs of seeds (no bar: one pair). A "
    "wall clock that differs more between equal runs than between methods has no "
    "verdict. Hollow markers with an arrow are bounds: no finished NTP run has that "
    "budget.",
    gain_vs_size,
  ),
  Plot(
    "loss_vs_size",
    "Next-token loss against size",
    "Held-out cross-entropy of the next-token head, extra predictors deleted; mean and "
    "95 % t interval over seeds.",
    loss_vs_size,
  ),
  Plot(
    "depth_losses",
    "Loss and accuracy of every depth against size",
    "Depth m predicts the token after m others; depth 0 is the next-token head.",
    depth_losses,
  ),
  Plot(
    "acceptance",
    "Drafts accepted, while decoding and by teacher forcing, against size",
    "Measured while decoding the prompts of the generative metrics with all D "
    "predictors as drafters, sampled at temperature 1 (first row) and greedily "
    "(second): tokens per verification (tau, the trunk's own token included), and how "
    "often draft k was accepted once the drafts before it were. A model that repeats "
    "itself greedily is easy to draft for. Last row, on true prefixes: one plus the "
    "mean number of depths that agree with the trunk in a row, and how often depth k "
    "does. None of these is a speed.",
    acceptance,
  ),
  Plot(
    "generation",
    "Generated code against size",
    "Greedy completions of held-out files by the deployed next-token model; mean and "
    "95 % t interval over seeds.",
    generation,
  ),
  Plot(
    "depth_sweep",
    "Gain against the number of extra tokens",
    "Methods that differ in D only. Equal tokens.",
    functools.partial(
      setting_sweep, setting="depth", label="D, extra tokens predicted"
    ),
  ),
  Plot(
    "weight_sweep",
    "Gain against the weight of the extra losses",
    "Methods that differ in λ only. Equal tokens.",
    functools.partial(
      setting_sweep, setting="weight", label="λ, weight of the extra losses"
    ),
  ),
  Plot(
    "learning_rates",
    "Learning rates tried",
    "Mean loss over the seeds of each rate; a ring marks the rate that is used.",
    learning_rates,
  ),
  Plot(
    "curves",
    "Next-token loss during training",
    "Validation loss, or the loss of training steps where there are no validations; "
    "mean over seeds. Only finished runs are compared in this report.",
    curves,
  ),
)


def draw(plot: Plot, ladder: Analysis) -> Drawing:
  """Returns a plot in the style of this report."""
  with matplotlib.rc_context(STYLE):
    return plot.draw(ladder)
