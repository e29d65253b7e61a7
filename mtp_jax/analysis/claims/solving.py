"""Tokens until a model solves a task, censored and paired by seed."""

import pandas as pd

from mtp_jax.analysis.claims import arms
from mtp_jax.analysis.claims.claim import Finding, found
from mtp_jax.analysis.results import REPLICATE, Results, Where
from mtp_jax.analysis.statistics import restricted_log_time, share_difference

SOLVED = 0.95  # Of validation answers, twice running.
RULE = (
  f"tokens until {SOLVED:g} of validation answers are right twice running, censored at "
  "the end of training; restricted mean of ln(tokens), NTP minus the arm, paired by "
  "seed, t interval over seeds"
)


def solve_times(results: Results, where: Where) -> pd.DataFrame:
  """Returns the trials with columns tokens_to (or when they ended) and solved.

  Training that stops on success records when it did (`stopped_tokens`); without such a
  stop the first of two validation records in a row that pass counts.
  """
  rows = results.select(where)
  if "stopped_tokens" in rows and results.trials["stopped_tokens"].notna().any():
    reached = rows.set_index("trial")["stopped_tokens"]
  else:
    curves = results.curves[results.curves["split"] == "validation"]
    curves = curves.dropna(subset="task_accuracy").sort_values(["trial", "step"])
    passes = curves["task_accuracy"] >= SOLVED
    again = passes.groupby(curves["trial"]).shift(-1, fill_value=False)
    reached = curves[passes & again].groupby("trial")["tokens"].first()
  at = rows["trial"].map(reached).astype(float)
  return rows.assign(tokens_to=at.fillna(rows["tokens"]), solved=at.notna())


def gains(ntp: pd.DataFrame, arm: pd.DataFrame) -> pd.DataFrame:
  """Returns NTP's minus the arm's restricted ln(tokens), one row a pair of a seed.

  The horizon is the same for both: the earliest end of a trial that did not solve.
  """
  both = pd.concat([ntp, arm])
  ended = both.loc[~both["solved"], "tokens_to"]
  horizon = ended.min() if len(ended) else both["tokens_to"].max()
  return arms.pairs(*(
    rows.assign(value=restricted_log_time(rows["tokens_to"], horizon, rows["solved"]))
    for rows in (ntp, arm)
  ))


def shares(ntp: pd.DataFrame, arm: pd.DataFrame) -> str:
  """Returns how many seeds solved the task, with Newcombe's interval, in words."""
  counts = [(int(rows["solved"].sum()), len(rows)) for rows in (arm, ntp)]
  if not all(n for _, n in counts):
    return ""
  difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*share_difference(*counts))
  (own, n), (plain, of) = counts
  bound = "; NTP never solves it: the gain is a lower bound" if own > plain == 0 else ""
  return f"solved by {own} of {n} seeds, NTP {plain} of {of}, {difference}{bound}"


def sooner(results: Results, where: Where, ntp: Where) -> Finding:
  """Tests whether an arm needs fewer tokens than NTP to solve the task."""
  own, plain = solve_times(results, where), solve_times(results, ntp)
  gain = gains(plain, own).set_index(list(REPLICATE))["gain"]
  return found(gain, "ln(tokens) saved", shares(plain, own))
