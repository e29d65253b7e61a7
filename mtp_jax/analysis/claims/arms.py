"""Arms of an experiment by their config values, and what was measured of them.

`parallel(n)` predicts n tokens at once, the next one included, as in Gloeckle et al.
2024; `sequential(depth)` predicts so many extra tokens, as in DeepSeek-V3.
"""

from typing import Any

import pandas as pd

from mtp_jax.analysis.results import Results
from mtp_jax.analysis.rules import paired

Where = dict[str, Any]
NTP: Where = {"mtp.kind": "none"}
WIDTH = "trunk.embed_dim"
# Settings that are tuned for each size and arm.
TUNED = ("optimizer.learning_rate", "optimizer.weight_decay")


def parallel(n: int) -> Where:
  return {"mtp.kind": "parallel", "mtp.depth": n - 1}


def sequential(depth: int) -> Where:
  return {"mtp.kind": "sequential", "mtp.depth": depth}


def label(kind: str, depth: int) -> str:
  """Returns NTP, parallel n=4 or sequential D=3."""
  if kind == "none":
    return "NTP"
  return f"parallel n={1 + depth}" if kind == "parallel" else f"{kind} D={depth}"


def penalty(results: Results, where: Where, ntp: Where | None = None) -> pd.Series:
  """Returns what an arm costs in next-token loss, a seed: its loss minus NTP's."""
  return paired(
    results.measured("main_loss", where), results.measured("main_loss", ntp or NTP)
  )


def reported(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
  """Returns the trials to report: of each arm (`keys`), at its tuned settings.

  A seed that an arm was trained with at several settings was used to choose among them
  and is left out. Of what is left the setting with the most seeds counts.
  """
  tuned = [key for key in TUNED if key in rows]
  if not tuned or rows.empty:
    return rows
  setting = rows[tuned].astype(str).agg(" ".join, axis="columns")
  rows = rows.assign(setting=setting)
  tried = rows.groupby([*keys, "seed"], dropna=False)["setting"].transform("nunique")
  rows = rows[tried == 1]
  most = rows.groupby(keys, dropna=False)["setting"].transform(
    lambda x: x.value_counts().index[0]
  )
  return rows[rows["setting"] == most].drop(columns="setting")


def at_moment(results: Results, metric: str, moment: str, best: str) -> pd.Series:
  """Returns a test score of every trial at its best or its last step, by trial.

  The best step has the lowest (`best` = "min") or highest ("max") validation score, the
  earliest among equals; the test score is read there. NaN: not measured.
  """
  curves = results.curves.dropna(subset=metric).sort_values("step", kind="stable")
  split = {name: own for name, own in curves.groupby("split")}
  if not {"validation", "test"} <= split.keys():
    return pd.Series(dtype=float)
  test = split["test"].drop_duplicates(["trial", "step"], keep="last")
  if moment == "last":
    return test.groupby("trial")[metric].last()
  by_trial = split["validation"].reset_index(drop=True).groupby("trial")[metric]
  places = by_trial.idxmin() if best == "min" else by_trial.idxmax()
  steps = split["validation"].reset_index(drop=True).loc[places, ["trial", "step"]]
  return steps.merge(test, how="left").set_index("trial")[metric]
