"""Arms of an experiment by their config values, and which of their trials count.

`parallel(n)` predicts n tokens at once, the next one included, as in Gloeckle et al.
2024; `sequential(depth)` predicts so many extra tokens, as in DeepSeek-V3.
"""

from collections.abc import Sequence

import pandas as pd

from mtp_jax.analysis.ladders import TUNED
from mtp_jax.analysis.results import REPLICATE, Results, Where, by_key
from mtp_jax.predictors import KINDS

NTP: Where = {"mtp.kind": "none"}
WIDTH = "trunk.embed_dim"


def parallel(n: int) -> Where:
  return {"mtp.kind": "parallel", "mtp.depth": n - 1}


def sequential(depth: int) -> Where:
  return {"mtp.kind": "sequential", "mtp.depth": depth}


def label(kind: str, depth: int) -> str:
  """Returns NTP, parallel n=4 or sequential D=3."""
  row = KINDS[kind]
  if not row.has_depths:
    return "NTP"
  # A head of the deployed model is counted too, as in the paper on these heads.
  return f"{kind} n={1 + depth}" if row.deployed_blocks else f"{kind} D={depth}"


def penalty(
  results: Results, arm: Where, at: Where | None = None, metric: str = "main_loss"
) -> pd.Series:
  """Returns what an arm costs, a seed: its loss minus NTP's, both of trials `at`."""
  at = at or {}
  return results.value(metric, arm | at) - results.value(metric, NTP | at)


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


def pairs(
  ntp: pd.DataFrame, arm: pd.DataFrame, keys: Sequence[str] = (), sign: int = 1
) -> pd.DataFrame:
  """Returns one row a pair of trials of one seed: the keys, REPLICATE and `gain`.

  The gain is NTP's `value` minus the arm's, times `sign`; pairs that lack either are
  left out. A sweep may train the same NTP trial once for each arm: it counts once.
  """
  index = [*keys, *REPLICATE]
  ntp = ntp.drop_duplicates([*index, "value"])
  gain = sign * (by_key(ntp, index) - by_key(arm, index))
  return gain.dropna().rename("gain").reset_index()


def at_moment(results: Results, metric: str, moment: str, best: str) -> pd.Series:
  """Returns a test score of every trial at its best or its last step, by trial.

  The best step has the lowest (`best` = "min") or highest ("max") validation score, the
  earliest among equals; the test score is read there. NaN: not measured.
  """
  curves = results.curves.dropna(subset=metric).sort_values("step", kind="stable")
  validation, test = (
    curves[curves["split"] == split].reset_index(drop=True)
    for split in ("validation", "test")
  )
  if validation.empty or test.empty:
    return pd.Series(dtype=float)
  if moment == "last":
    return test.groupby("trial")[metric].last()
  by_trial = validation.groupby("trial")[metric]
  places = by_trial.idxmin() if best == "min" else by_trial.idxmax()
  test = test.drop_duplicates(["trial", "step"], keep="last")
  steps = validation.loc[places, ["trial", "step"]]
  return steps.merge(test, how="left").set_index("trial")[metric]
