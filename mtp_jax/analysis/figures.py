"""The figures of the report, each with the table of the numbers that it shows.

Every function takes one ladder's `Analysis` and returns `(Figure, DataFrame)`, or None
where the ladder has nothing to show. Error bars are 95 % t intervals over seeds and are
left out where there is one seed.
"""

import dataclasses
import math
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from mtp_jax.analysis.drawing import (
  COLOURS,
  STYLE,
  fitted_lines,
  forest,
  gain_lines,
  legend_below,
  level_lines,
  marker,
  method_styles,
  panels,
  share_axis,
  size_axis,
  zero_line,
)
from mtp_jax.analysis.gains import COMPARISONS, TOKENS, Analysis
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.published import SOURCE, published_gains
from mtp_jax.analysis.setting_sweeps import depth_sweep, weight_sweep

Drawing = tuple[Figure, pd.DataFrame] | None

_BENCHMARK_LINES = {"MBPP": "-", "HumanEval": "--"}
_PUBLISHED_COLOURS = {1: "#56B4E9", 3: COLOURS["parallel"]}  # Both are parallel heads.


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of the report: file stem, heading, caption and how it is drawn."""

  stem: str
  title: str
  caption: str
  draw: Callable[[Analysis], Drawing]


def gain_vs_size(ladder: Analysis) -> Drawing:
  gains = ladder.gains[ladder.gains["metric"] == "main_loss"]
  if not len(gains):
    return None
  if gains["size"].nunique() == 1:
    columns = {
      f"gain at equal {c}, nats per token": gains[gains["comparison"] == c]
      for c in COMPARISONS
    }
    return forest(columns, zero=True), gains
  figure, axes = panels(1, 3, sharey=True)
  styles = method_styles(gains)
  for ax, comparison in zip(axes.flat, COMPARISONS, strict=True):
    rows = gains[gains["comparison"] == comparison]
    gain_lines(ax, rows, styles)
    fitted_lines(ax, ladder.slopes, comparison, rows, styles)
    ax.set_title(f"equal {comparison}")
    size_axis(ax, gains["size"])
  axes.flat[0].set_ylabel("gain over NTP, nats per token\n(above 0: MTP is better)")
  legend_below(figure, axes.flat)
  return figure, gains


def loss_vs_size(ladder: Analysis) -> Drawing:
  metrics = {"main_loss": "nats per token", "bits_per_byte": "bits per byte"}
  rows = ladder.levels[
    ladder.levels["metric"].isin(metrics) & (ladder.levels["arm"] != "flops")
  ]
  if not len(rows):
    return None
  if rows["size"].nunique() == 1:
    columns = {
      f"next-token loss, {unit}": rows[rows["metric"] == metric]
      for metric, unit in metrics.items()
    }
    return forest(columns, zero=False), rows
  figure, axes = panels(1, 2)
  styles = method_styles(rows)
  for ax, (metric, unit) in zip(axes.flat, metrics.items(), strict=True):
    level_lines(ax, rows[rows["metric"] == metric], styles)
    ax.set_ylabel(f"next-token loss, {unit}")
    size_axis(ax, rows["size"])
  legend_below(figure, axes.flat)
  return figure, rows


def slopes(ladder: Analysis) -> Drawing:
  rows = ladder.slopes[ladder.slopes["metric"] == "main_loss"]
  if not len(rows):
    return None
  by_comparison = rows.rename(columns={"slope": "mean"}).groupby("comparison")
  columns = {
    f"equal {c}: nats per token per decade": by_comparison.get_group(c)
    for c in COMPARISONS
    if c in by_comparison.groups
  }
  return forest(columns, zero=True), rows


def gain_beside_published(ladder: Analysis) -> Drawing:
  gains = ladder.gains[
    (ladder.gains["metric"] == "main_loss") & (ladder.gains["comparison"] == TOKENS)
  ]
  published = published_gains()
  figure, axes = panels(3, 1, height=7.6, width=7.2, sharex=True)
  measured, *below = axes.flat
  if len(gains):
    gain_lines(measured, gains, method_styles(gains))
    measured.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
  measured.set_title("measured here: next-token loss, equal tokens")
  measured.set_ylabel("gain, nats per token")
  for ax, k in zip(below, (1, 100), strict=True):
    for depth in (1, 3):
      for name, line in _BENCHMARK_LINES.items():
        rows = published[
          (published["benchmark"] == f"{name}@{k}") & (published["depth"] == depth)
        ]
        ax.plot(
          rows["size"], rows["gain"], line, color=_PUBLISHED_COLOURS[depth],
          marker=marker(depth), label=f"{name}, n={depth + 1} (D={depth})",
        )
    zero_line(ax)
    ax.set_title(f"published: pass@{k}, parallel heads (Gloeckle et al. 2024)")
    ax.set_ylabel("gain, percentage points")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
  everything = [*gains["size"], *published["size"]]
  size_axis(axes.flat[-1], pd.Series(everything), "parameters")
  table = pd.concat(
    [
      gains.assign(source="measured here"),
      published.rename(columns={"gain": "mean"}).assign(source=SOURCE, unit="points"),
    ],
    ignore_index=True,
  )
  return figure, table


def depth_losses(ladder: Analysis) -> Drawing:
  names = {"depth_loss": "loss, nats per token", "depth_accuracy": "accuracy"}
  rows = ladder.levels[
    ladder.levels["metric"].isin(names) & (ladder.levels["arm"] != "flops")
  ]
  if not len(rows):
    return None
  depths = sorted(rows["at_depth"].unique())
  figure, axes = panels(2, len(depths), sharey="row", sharex=True, height=5.2)
  styles = method_styles(rows)
  for row_axes, (metric, label) in zip(axes, names.items(), strict=True):
    row_axes[0].set_ylabel(label)
    for ax, depth in zip(row_axes, depths, strict=True):
      chosen = rows[(rows["metric"] == metric) & (rows["at_depth"] == depth)]
      level_lines(ax, chosen, styles)
      if metric == "depth_accuracy":
        share_axis(ax)
  for ax, depth in zip(axes[0], depths, strict=True):
    ax.set_title("next token (depth 0)" if depth == 0 else f"depth {depth}")
  for ax in axes[1]:
    size_axis(ax, rows["size"])
  legend_below(figure, axes.flat)
  return figure, rows


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
  rows = ladder.levels[
    ladder.levels["metric"].isin([*lengths, *shares]) & (ladder.levels["depth"] > 0)
  ]
  if not len(rows):
    return None
  depths = sorted(rows.loc[rows["metric"].isin(shares), "at_depth"].unique())
  figure, axes = panels(3, 1 + len(depths), sharex=True, height=7.6)
  styles = method_styles(rows)
  for row_axes, length, share in zip(axes, lengths, shares, strict=True):
    first, *others = row_axes
    level_lines(first, rows[rows["metric"] == length], styles)
    first.set_title(lengths[length])
    first.set_ylabel("tokens")
    first.sharey(axes[0, 0])
    for ax, depth in zip(others, depths, strict=True):
      chosen = (rows["metric"] == share) & (rows["at_depth"] == depth)
      level_lines(ax, rows[chosen], styles)
      ax.set_title(f"{shares[share]}, depth {depth}")
      ax.set_ylabel("share")
      share_axis(ax)
  for ax in axes[-1]:
    size_axis(ax, rows["size"])
  legend_below(figure, axes.flat)
  return figure, rows


def generation(ladder: Analysis) -> Drawing:
  names = {
    "next_line_exact_match": "next line matches exactly",
    "function_parses": "completed function parses",
  }
  rows = ladder.levels[
    ladder.levels["metric"].isin(names) & (ladder.levels["arm"] != "flops")
  ]
  if not len(rows):
    return None
  # One seed has no interval over seeds; its binomial error over prompts is shown.
  single = rows["low"].isna()
  rows = rows.assign(
    interval=np.where(single, "1.96 standard errors over prompts", "95 % over seeds"),
    low=rows["low"].fillna(rows["mean"] - 1.96 * rows["stderr"]),
    high=rows["high"].fillna(rows["mean"] + 1.96 * rows["stderr"]),
  )
  measured = [metric for metric in names if (rows["metric"] == metric).any()]
  figure, axes = panels(1, len(measured))
  styles = method_styles(rows)
  for ax, metric in zip(axes.flat, measured, strict=True):
    level_lines(ax, rows[rows["metric"] == metric], styles)
    ax.set_title(names[metric])
    ax.set_ylabel("share of prompts")
    share_axis(ax)
    size_axis(ax, rows["size"])
  legend_below(figure, axes.flat)
  return figure, rows


def learning_rates(ladder: Analysis) -> Drawing:
  rows = ladder.rates[ladder.rates["arm"] != "flops"]
  tried = rows.groupby(["method", "size"])["learning_rate"].transform("size")
  rows = rows[(tried > 1) & np.isfinite(rows["mean"].astype(float))]
  if not len(rows):
    return None
  sizes = sorted(rows["size"].unique())
  columns = min(len(sizes), 4)
  figure, axes = panels(math.ceil(len(sizes) / columns), columns)
  styles = method_styles(rows)
  for ax, size in zip(axes.flat, sizes, strict=False):
    for method, line in rows[rows["size"] == size].groupby("method"):
      line = line.sort_values("learning_rate")
      ax.plot(line["learning_rate"], line["mean"], label=method, **styles[method])
      used = line[line["chosen"]]
      ax.plot(
        used["learning_rate"], used["mean"], "o", markersize=11, fillstyle="none",
        color=styles[method]["color"],
      )
    ax.set_xscale("log")
    tried = sorted(rows.loc[rows["size"] == size, "learning_rate"].unique())
    ax.xaxis.set_major_locator(FixedLocator(tried))  # Of this size alone.
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", labelrotation=45)
    ax.set_title(f"{size_text(size)} parameters")
    ax.set_xlabel("peak learning rate")
  for ax in axes.flat[len(sizes) :]:
    ax.set_visible(False)
  for row_axes in axes:
    row_axes[0].set_ylabel("next-token loss, nats per token")
  legend_below(figure, axes.flat)
  return figure, rows


def curves(ladder: Analysis) -> Drawing:
  trials = ladder.trials[ladder.trials["chosen"] & (ladder.trials["arm"] != "flops")]
  records = ladder.runs.curves
  rows = records[records["split"] == "validation"].merge(
    trials, on="trial", suffixes=("", "_final")
  )
  if not len(rows):
    return None
  keys = ["size", "order", "method", "kind", "depth", "arm", "tokens"]
  rows = rows.groupby(keys, as_index=False).agg(
    loss=("loss", "mean"), bits_per_byte=("bits_per_byte", "mean"), n=("loss", "size")
  )
  sizes = sorted(rows["size"].unique())
  columns = min(len(sizes), 4)
  figure, axes = panels(math.ceil(len(sizes) / columns), columns)
  styles = method_styles(rows)
  for ax, size in zip(axes.flat, sizes, strict=False):
    for method, line in rows[rows["size"] == size].groupby("method"):
      ax.plot(line["tokens"], line["loss"], label=method, **styles[method])
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(x)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title(f"{size_text(size)} parameters")
    ax.set_xlabel("tokens")
  for ax in axes.flat[len(sizes) :]:
    ax.set_visible(False)
  for row_axes in axes:
    row_axes[0].set_ylabel("next-token loss, nats per token")
  legend_below(figure, axes.flat)
  return figure, rows


PLOTS = (
  Plot(
    "gain_vs_size",
    "Gain over next-token prediction against size",
    "Paired differences of the next-token loss with the extra predictors deleted, NTP "
    "minus MTP: mean and 95 % t interval over pairs of seeds (no bar: one pair). Thin "
    "lines are the fitted trends. A wall clock that differs more between equal runs "
    "than between methods has no verdict. Hollow markers with an arrow are bounds: no "
    "finished NTP run has that budget.",
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
    "slopes",
    "Gain per decade of size",
    "Slope of the gain on log10 of the size, fitted for each seed; mean and 95 % t "
    "interval over the seeds that have every size.",
    slopes,
  ),
  Plot(
    "gain_beside_published",
    "The same axis with published gains",
    "Top: this ladder. Below: models of 0.3B to 13B parameters that predict n = 2 and "
    "n = 4 tokens minus n = 1, on MBPP and HumanEval. The panels share the size axis "
    f"but not the measure, the data or the training length. Source: {SOURCE}; 0.3B to "
    "3B saw 91.0 billion tokens, 6.7B and 13B 209.7 billion.",
    gain_beside_published,
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
    "(second): tokens per verification (tau, the token of the trunk's own included), "
    "and how often draft k was accepted once those before it were. A model that "
    "repeats itself greedily is easy to draft for. Last row, on true prefixes: one "
    "plus the mean number of depths that agree with the trunk in a row, and how often "
    "depth k does. None of these is a speed.",
    acceptance,
  ),
  Plot(
    "generation",
    "Generated code against size",
    "Greedy completions of held-out files by the deployed next-token model. Bars: 95 % "
    "t interval over seeds; with one seed, 1.96 binomial standard errors over prompts.",
    generation,
  ),
  Plot(
    "depth_sweep",
    "Loss and gain against the number of extra tokens",
    "Methods that differ in D only; the dashed line is NTP. Equal tokens.",
    depth_sweep,
  ),
  Plot(
    "weight_sweep",
    "Loss and gain against the weight of the extra losses",
    "Methods that differ in λ only; the dashed line is NTP. Equal tokens.",
    weight_sweep,
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
    "Validation loss, mean over seeds. Only finished runs are compared in this report.",
    curves,
  ),
)


def draw(plot: Plot, ladder: Analysis) -> Drawing:
  """Returns a plot in the style of this report."""
  with matplotlib.rc_context(STYLE):
    return plot.draw(ladder)
