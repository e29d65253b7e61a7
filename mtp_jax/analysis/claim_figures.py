"""One picture an experiment: what its claims are decided by.

Every function returns the figure and the numbers in it, one row a point. Colour is the
kind of predictor, the marker is D, as in the report of a ladder.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from mtp_jax.analysis import claim_tests as tests
from mtp_jax.analysis.drawing import (
  COLOURS,
  LINES,
  ZERO,
  error_bars,
  legend_below,
  marker,
  panels,
  size_axis,
)
from mtp_jax.analysis.gains import interval
from mtp_jax.analysis.results import LadderResults, Results

Drawing = tuple[Figure, pd.DataFrame]

_SEED_DOT = dict(s=18, alpha=0.7, linewidths=0)
_DASHED = dict(color="#777777", linewidth=0.8, linestyle="--")


def method_label(kind: str, depth: int) -> str:
  """Returns NTP, parallel n=4 or sequential D=3."""
  if kind == "none":
    return "NTP"
  return f"parallel n={1 + depth}" if kind == "parallel" else f"{kind} D={depth}"


def draw_star_graph(results: Results) -> Drawing:
  """Accuracy of each seed by method, and during training."""
  final = _with_method(tests.star_graph_rows(results, {}))
  final["method"] += np.where(final["task.star_graph.reversed"], " reversed", "")
  arms, length = "task.star_graph.arms", "task.star_graph.length"
  graphs = list(final.groupby([arms, length]))
  figure, axes = panels(2, len(graphs), height=6.0, sharey=True)
  tables = []
  for (graph, rows), (above, below) in zip(graphs, axes.T, strict=True):
    curves = results.curves.dropna(subset="task_accuracy").merge(
      rows[["trial", "method", "mtp.kind", "mtp.depth", "seed"]]
    )
    _dots(above, rows, list(rows["method"].unique()))
    for ax in (above, below):
      ax.axhline(1 / graph[0], **_DASHED)
    for trial, curve in curves.groupby("trial", sort=False):
      method = curve["method"].iloc[0]
      below.plot(
        curve["step"], curve["task_accuracy"], linewidth=0.8,
        color=_style(curve.iloc[0])["color"], label=method,
        linestyle=_line(method, curve["mtp.depth"].iloc[0]),
      )
      tables.append(
        curve[["method", "seed", "step", "task_accuracy"]].assign(
          graph=str(graph), trial=trial, shown="validation"
        )
      )
    above.set_title(f"G({graph[0]:g},{graph[1]:g})")
    below.set_xlabel("step")
    tables.append(
      rows[["method", "seed", "step", "value", "trial"]].rename(
        columns={"value": "task_accuracy"}
      ).assign(graph=str(graph), shown="final")
    )
  for ax in axes[:, 0]:
    ax.set_ylabel("exact paths")
  legend_below(figure, axes[1])
  return figure, pd.concat(tables, ignore_index=True)


def draw_accuracy(results: Results) -> Drawing:
  """Accuracy of each seed by method."""
  rows = _with_method(tests.task_rows(results, {}).dropna(subset="value"))
  figure, axes = panels(1, 1, width=5.5)
  _dots(axes[0, 0], rows, list(rows["method"].unique()))
  axes[0, 0].set_ylabel("task accuracy")
  return figure, rows[["trial", "method", "seed", "value"]]


def draw_polynomial(results: Results) -> Drawing:
  """Accuracy by number of operations."""
  rows = _with_method(tests.operator_rows(results, {}))
  figure, axes = panels(1, 1, width=5.5)
  table = _lines(axes[0, 0], rows, "operators", ["method"])
  axes[0, 0].axvline(
    rows["task.polynomial.max_operators"].max() + 0.5, color="#777777", linestyle=":"
  )
  axes[0, 0].set(xlabel="operations in the expression", ylabel="accuracy")
  legend_below(figure, axes.flat)
  return figure, table


def draw_induction(results: Results) -> Drawing:
  """Accuracy against width."""
  rows = _with_method(tests.task_rows(results, {}))
  figure, axes = panels(1, 1, width=5.5)
  table = _lines(axes[0, 0], rows, tests.WIDTH, ["method"])
  axes[0, 0].set(xlabel="width", ylabel="task accuracy")
  legend_below(figure, axes.flat)
  return figure, table


def draw_acceptance(results: Results) -> Drawing:
  """Conditional acceptance by depth, one panel a text."""
  results.key(tests.WIDTH)
  rows = _with_method(
    pd.concat([
      tests.acceptance_rows(results, {}, k).assign(at_depth=k) for k in (1, 2, 3)
    ]).dropna(subset="value")
  )
  texts = list(rows[tests.TEXT].unique())
  figure, axes = panels(1, max(len(texts), 1), sharey=True)
  tables = []
  for ax, text in zip(axes.flat, texts, strict=True):
    own = rows[rows[tests.TEXT] == text]
    own = own.assign(width="width " + own[tests.WIDTH].astype(str))
    table = _lines(ax, own, "at_depth", ["method", "width"])
    tables.append(table.assign(text=text))
    ax.set(title=text, xlabel="depth of the draft", xticks=(1, 2, 3))
  axes[0, 0].set_ylabel("conditional acceptance")
  legend_below(figure, axes.flat)
  return figure, pd.concat(tables) if tables else rows


def draw_schedules(results: Results) -> Drawing:
  """Penalty against tokens per round, one point a schedule."""
  figure, axes = panels(1, 1, width=5.5)
  ax = axes[0, 0]
  table = []
  for base in (tests.parallel(4), tests.sequential(1)):
    for index, (arm, where) in enumerate(tests.SCHEDULE_ARMS.items()):
      rounds = results.measured("sampled_tokens_per_round", base | where)["value"]
      over = {
        "penalty": interval(tests.penalty(results, base | where).dropna()),
        "rounds": interval(rounds.dropna()),
      }
      if not over["penalty"]["n"] or not over["rounds"]["n"]:
        continue
      x, y = (pd.DataFrame([over[key]]) for key in ("penalty", "rounds"))
      method = method_label(base["mtp.kind"], base["mtp.depth"])
      ax.errorbar(
        x["mean"], y["mean"], xerr=error_bars(x), yerr=error_bars(y), capsize=3,
        color=COLOURS[base["mtp.kind"]], marker=marker(index), linestyle="none",
        label=f"{method}, {arm}",
      )
      table.append({"method": method, "arm": arm} | {
        f"{name}_{key}": value
        for name, values in over.items() for key, value in values.items()
      })
  ax.axvline(0, **ZERO)
  ax.set(
    xlabel="next-token loss minus NTP's, nats", ylabel="sampled tokens per round"
  )
  legend_below(figure, axes.flat)
  return figure, pd.DataFrame(table)


def draw_bytes(results: Results) -> Drawing:
  """Penalty in bits per byte against n, one line a tokenizer."""
  rows = pd.concat([
    tests.bits_penalty(results, kind, n).rename("value").reset_index().assign(
      predicted=n, tokenizer=kind
    )
    for kind in ("bytes", "bpe") for n in (4, 8)
  ])
  figure, axes = panels(1, 1, width=5.5)
  styles = {
    ("bytes",): {"color": COLOURS["parallel"], "marker": marker(0)},
    ("bpe",): {"color": COLOURS["sequential"], "marker": marker(1)},
  }
  table = _lines(axes[0, 0], rows, "predicted", ["tokenizer"], styles)
  axes[0, 0].axhline(0, **ZERO)
  axes[0, 0].set(
    xlabel="tokens predicted at once, n", ylabel="bits per byte over NTP",
    xticks=(4, 8),
  )
  legend_below(figure, axes.flat)
  return figure, table


def draw_repetition(results: Results) -> Drawing:
  """Gain against the share of documents that is not trained on."""
  fractions = results.select({})[results.key(tests.REPETITION)].unique()
  rows = _with_method(
    pd.concat([
      tests.repetition_gain(results, n, fraction).rename("value").reset_index().assign(
        **tests.parallel(n), fraction=fraction
      )
      for n in (2, 4) for fraction in fractions
    ])
  )
  figure, axes = panels(1, 1, width=5.5)
  table = _lines(axes[0, 0], rows, "fraction", ["method"])
  axes[0, 0].axhline(0, **ZERO)
  axes[0, 0].set(
    xlabel="share of documents held out", ylabel="gain over NTP, nats per token"
  )
  legend_below(figure, axes.flat)
  return figure, table


def draw_hidden(results: Results) -> Drawing:
  """Acceptance at depths 1 and 2 and the main loss, by what the module is fed."""
  shown = (
    ("acceptance at depth 1", "sampled_acceptance", 1),
    ("acceptance at depth 2", "sampled_acceptance", 2),
    ("main loss, nats per token", "main_loss", 0),
  )
  keys = [results.key(f"mtp.{key}") for key in ("hidden", "hidden_norm", "fed")]
  figure, axes = panels(1, len(shown), height=3.8)
  tables = []
  for ax, (title, metric, depth) in zip(axes.flat, shown, strict=True):
    rows = results.measured(metric, tests.sequential(2), depth).dropna(subset="value")
    rows = rows.assign(method=rows[keys].agg(", ".join, axis="columns"))
    _dots(ax, rows, list(rows["method"].unique()))
    ax.set_title(title)
    tables.append(rows[["trial", "method", "seed", "value"]].assign(shown=title))
  return figure, pd.concat(tables)


def draw_gains(results: LadderResults) -> Drawing:
  """Gain at equal tokens against size."""
  rows = pd.concat([
    tests.ladder_pairs(results, kind, depth)
    for kind in ("parallel", "sequential") for depth in (1, 3)
  ]).rename(columns={"gain": "value", "kind": "mtp.kind", "depth": "mtp.depth"})
  rows = _with_method(rows)
  figure, axes = panels(1, 1, width=5.5)
  table = _lines(axes[0, 0], rows, "size", ["method"])
  size_axis(axes[0, 0], rows["size"])
  axes[0, 0].axhline(0, **ZERO)
  axes[0, 0].set_ylabel("gain over NTP, nats per token")
  legend_below(figure, axes.flat)
  return figure, table


def _with_method(rows: pd.DataFrame) -> pd.DataFrame:
  """Adds column `method`; NTP first, then by kind and D."""
  order = {kind: index for index, kind in enumerate(COLOURS)}
  rows = rows.assign(
    method=[
      method_label(*x) for x in zip(rows["mtp.kind"], rows["mtp.depth"], strict=True)
    ],
    order=rows["mtp.kind"].map(order),
  )
  return rows.sort_values(["order", "mtp.depth"], kind="stable").reset_index(drop=True)


def _style(row: pd.Series) -> dict[str, Any]:
  return {"color": COLOURS[row["mtp.kind"]], "marker": marker(row["mtp.depth"])}


def _line(method: str, depth: int) -> str:
  return ":" if method.endswith("reversed") else LINES[int(depth > 1)]


def _dots(ax: Axes, rows: pd.DataFrame, methods: Sequence[str]) -> None:
  """A dot a seed, beside their mean and interval."""
  for place, method in enumerate(methods):
    own = rows[rows["method"] == method]
    style = _style(own.iloc[0])
    spread = np.linspace(-0.18, 0.18, len(own)) if len(own) > 1 else [0.0]
    ax.scatter(place + np.asarray(spread), own["value"], **style, **_SEED_DOT)
    over = pd.DataFrame([interval(own["value"])])
    ax.errorbar(
      place + 0.3, over["mean"], yerr=error_bars(over), capsize=3, markersize=4, **style
    )
  ax.set_xticks(range(len(methods)), methods, rotation=25, ha="right")


def _lines(
  ax: Axes,
  rows: pd.DataFrame,
  x: str,
  keys: Sequence[str],
  styles: dict[tuple, dict[str, Any]] | None = None,
) -> pd.DataFrame:
  """Draws mean and interval over seeds against `x`, a line for each value of the keys.

  Without styles the first key is the method: colour and marker are its own, the line
  tells the values of the second apart. Returns the numbers drawn.
  """
  table = []
  groups = list(rows.dropna(subset="value").groupby(list(keys), sort=False))
  seconds = list(dict.fromkeys(key[1:] for key, _ in groups))
  for index, (key, own) in enumerate(groups):
    style = styles[key] if styles else _style(own.iloc[0]) | {
      "linestyle": LINES[seconds.index(key[1:]) % len(LINES)]
    }
    line = pd.DataFrame({at: interval(y) for at, y in own.groupby(x)["value"]}).T
    # A few points apart, whatever the axis: intervals at one place stay legible.
    aside = ScaledTranslation(
      4 * (index - (len(groups) - 1) / 2) / 72, 0, ax.figure.dpi_scale_trans
    )
    ax.errorbar(
      line.index, line["mean"], yerr=error_bars(line), capsize=3,
      label=", ".join(map(str, key)), transform=ax.transData + aside, **style,
    )
    # Points drawn aside do not count for the limits of the axes.
    ends = line[["mean", "low", "high"]].stack()
    ax.update_datalim(np.column_stack([ends.index.get_level_values(0), ends]))
    labels = dict(zip(keys, key, strict=True))
    table.append(line.rename_axis(x).reset_index().assign(**labels))
  ax.autoscale_view()
  return pd.concat(table, ignore_index=True) if table else rows

