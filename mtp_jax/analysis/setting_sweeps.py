"""Loss and gain against one setting of the predictors: D, or the weight lambda."""

import dataclasses

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from mtp_jax.analysis.drawing import (
  COLOURS,
  LINES,
  error_bars,
  legend_below,
  panels,
  series_marker,
  zero_line,
)
from mtp_jax.analysis.gains import TOKENS, Analysis
from mtp_jax.analysis.ladders import NTP, size_text

Drawing = tuple[Figure, pd.DataFrame] | None


def depth_sweep(ladder: Analysis) -> Drawing:
  return _setting_sweep(ladder, "depth", "D, extra tokens predicted")


def weight_sweep(ladder: Analysis) -> Drawing:
  return _setting_sweep(ladder, "weight", "λ, weight of the extra losses")


def _setting_sweep(ladder: Analysis, setting: str, label: str) -> Drawing:
  """Loss and paired gain against one number of the mtp section, a column per size."""
  rows = _families(ladder, setting)
  if rows is None:
    return None
  sizes = sorted(rows["size"].unique())
  figure, axes = panels(2, len(sizes), sharex=True, sharey="row", height=5.2)
  for column, size in zip(axes.T, sizes, strict=True):
    here = rows[rows["size"] == size]
    for index, (family, line) in enumerate(here.groupby("family")):
      style = dict(
        color=COLOURS[line["kind"].iloc[0]], linestyle=LINES[index % len(LINES)],
        marker=series_marker(index), capsize=3, label=family,
      )
      for ax, quantity in zip(column, ("loss", "gain"), strict=True):
        part = line[line["quantity"] == quantity].sort_values(setting)
        ax.errorbar(part[setting], part["mean"], yerr=error_bars(part), **style)
    ntp = here["ntp_loss"].iloc[0]
    if np.isfinite(ntp):
      column[0].axhline(ntp, color=COLOURS["none"], linestyle="--", label=NTP)
    zero_line(column[1])
    column[0].set_title(f"{size_text(size)} parameters")
    column[1].set_xlabel(label)
    column[1].xaxis.set_major_locator(FixedLocator(sorted(rows[setting].unique())))
    column[1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  axes[0, 0].set_ylabel("next-token loss, nats per token")
  axes[1, 0].set_ylabel("gain over NTP, nats per token")
  legend_below(figure, axes.flat)
  return figure, rows


def _families(ladder: Analysis, setting: str) -> pd.DataFrame | None:
  """Losses and gains of methods that agree in all but `setting`, two values or more."""
  trials = ladder.trials[ladder.trials["chosen"] & (ladder.trials["depth"] > 0)]
  blank = {"depth": 0, "weight": 0.0}[setting]
  of_method = {m: mtp for m, mtp in zip(trials["method"], trials["mtp"], strict=True)}
  family = {
    m: dataclasses.replace(mtp, **{setting: blank})
    for m, mtp in of_method.items()
  }
  is_main = lambda t: t[t["metric"] == "main_loss"]  # noqa: E731
  gains = is_main(ladder.gains)
  tables = [
    is_main(ladder.levels).assign(quantity="loss"),
    gains[gains["comparison"] == TOKENS].assign(quantity="gain"),
  ]
  rows = pd.concat(tables, ignore_index=True)
  ntp = rows[(rows["method"] == NTP) & (rows["quantity"] == "loss")]
  rows = rows[rows["method"].isin(family)].copy()
  if not len(rows):
    return None
  rows[setting] = [getattr(of_method[m], setting) for m in rows["method"]]
  key = rows["method"].map(lambda m: str(family[m]))
  values = rows.groupby([key, "size"])[setting].transform("nunique")
  rows, key = rows[values > 1], key[values > 1]
  if not len(rows):
    return None
  # A family is called after its first member, without the number that varies.
  member = {k: rows.loc[key == k, "method"].iloc[0] for k in key.unique()}
  drop = {"depth": " D=", "weight": " λ="}[setting]
  rows["family"] = key.map(lambda k: _without_word(member[k], drop))
  rows["ntp_loss"] = rows["size"].map(ntp.set_index("size")["mean"])
  columns = [
    "ladder", "family", "method", "kind", "size", setting, "quantity", "n", "mean",
    "low", "high", "ntp_loss",
  ]
  return rows[columns]


def _without_word(text: str, start: str) -> str:
  return " ".join(w for w in text.split() if not w.startswith(start.strip()))
