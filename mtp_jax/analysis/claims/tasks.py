"""3-SAT, Countdown, polynomials, induction: accuracy of parallel heads and of NTP."""

from collections.abc import Callable

import pandas as pd

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import WIDTH
from mtp_jax.analysis.results import REPLICATE, Results, Where, by_key

# Why the runs of a preset that are kept here cannot test their claims.
_NOT_TESTED = {
  "sat_cpu": "a formula has 5.2 solutions on average, and setting each variable to the "
  "sign that it has more often solves 52 %: all models score below this rule, so that "
  "the score measures how much of it was learnt; the published gain is of 50,000 "
  "formulas seen 300 times, these were endless",
  "countdown_cpu": "26,000 problems against the published 5e7 presentations, one of "
  "several solutions drawn at random as the target, and the loss still falling by 8 % "
  "per 100 steps at the end",
  "polynomial_cpu": "after 400 steps the loss is that of guessing (5 ln 7 / 6 = 1.62 "
  "nats), so that accuracy has nothing to show",
  "induction_cpu": "names come from 500 of 2,500 pairs by Zipf's law and are cheapest "
  "to learn by heart: the loss on new names rises during training; 0.8M tokens against "
  "26B",
}
# Returns a finding, and the trials of which one arm must have learnt the task.
Test = Callable[[Results], tuple[claim.Finding, pd.DataFrame]]


def _task(
  name: str, title: str, caption: str, source: str, floor: float,
  *claims: tuple[str, str, str, Test],
) -> Callable[[str], claim.Experiment]:
  """Returns what makes the experiment of a task in a preset.

  claims: key, statement, rule and test; undecided where no arm's mean accuracy reaches
          the floor.
  """

  def experiment(preset: str) -> claim.Experiment:
    why = _NOT_TESTED.get(f"{name}_{preset}", "")
    own = (
      claim.Claim(
        key, statement, source, claim.NO_FIGURE,
        f"{rule}, {claim.PAIRED}; undecided if no arm's mean accuracy reaches "
        f"{floor:g}",
        claim.POINTS,
        lambda results, test=test: _unless_nothing_was_learnt(*test(results), floor),
        why,
      )
      for key, statement, rule, test in claims
    )
    return claim.Experiment(name, preset, title, caption, tuple(own))

  return experiment


def task_rows(results: Results, where: Where | None = None) -> pd.DataFrame:
  return results.measured("task_accuracy", where or {})


def operator_rows(results: Results) -> pd.DataFrame:
  """Returns the accuracy by number of operations: columns operators, value, count."""
  pattern = r"task_accuracy:operators=(\d+)"
  operators = results.metrics["metric"].str.extract(pattern, expand=False)
  groups = results.metrics[["trial", "count"]].assign(
    operators=operators, value=results.metrics["mean"]
  )
  return results.select({}).merge(
    groups.dropna(subset="operators").astype({"operators": int})
  )


def in_domain_rows(results: Results) -> pd.DataFrame:
  """Returns the accuracy on as many operations as were trained on, or fewer."""
  most = results.key("task.polynomial.max_operators")
  groups = operator_rows(results)
  groups = groups[groups["operators"] <= groups[most]]
  sums = groups.assign(correct=groups["value"] * groups["count"]).groupby("trial")
  share = sums["correct"].sum() / sums["count"].sum()
  rows = results.select({})
  return rows.assign(value=rows["trial"].map(share).astype(float))


def _gain(rows: pd.DataFrame, n: int) -> pd.Series:
  """Returns the accuracy of n heads minus NTP's, a seed."""
  is_own = (rows["mtp.kind"] == "parallel") & (rows["mtp.depth"] == n - 1)
  own, ntp = rows[is_own], rows[rows["mtp.kind"] == "none"]
  return by_key(own, REPLICATE) - by_key(ntp, REPLICATE)


def most_heads_gain(results: Results) -> tuple[claim.Finding, pd.DataFrame]:
  """Tests whether the most heads answer more than NTP."""
  rows = task_rows(results)
  heads = rows.loc[rows["mtp.kind"] == "parallel", "mtp.depth"]
  n = int(heads.max() + 1 if len(heads) else 2)
  return claim.found(_gain(rows, n), f"n={n} minus NTP"), rows


def two_gain_in_domain(results: Results) -> tuple[claim.Finding, pd.DataFrame]:
  rows = in_domain_rows(results)
  return claim.found(_gain(rows, 2), "n=2 minus NTP"), rows


def two_gain_when_small(results: Results) -> tuple[claim.Finding, pd.DataFrame]:
  """Tests whether n = 2 is better than NTP at the smallest width."""
  least = results.trials[results.key(WIDTH)].min()
  rows = task_rows(results, {WIDTH: least})
  return claim.found(_gain(rows, 2), f"width {least}, n=2 minus NTP"), rows


def gain_shrinks(results: Results) -> tuple[claim.Finding, pd.DataFrame]:
  """Tests whether that gain is smaller at the largest width."""
  widths = results.trials[results.key(WIDTH)]
  small, large = widths.min(), widths.max()
  change = _gain(task_rows(results, {WIDTH: small}), 2) - _gain(
    task_rows(results, {WIDTH: large}), 2
  )
  finding = claim.found(change, f"gain at {small} minus at {large}")
  if small == large:
    finding = finding.undecided("only one width")
  return finding, task_rows(results)


def _unless_nothing_was_learnt(
  finding: claim.Finding, rows: pd.DataFrame, floor: float
) -> claim.Finding:
  """Returns the finding, undecided if no arm's mean accuracy reaches the floor."""
  means = rows.dropna(subset="value").groupby(["mtp.kind", "mtp.depth"])["value"].mean()
  if finding.fixed or not len(means) or means.max() >= floor:
    return finding
  best = f"the best mean accuracy is {means.max():.3f}, below {floor:g}"
  return finding.undecided(f"no arm has learnt the task: {best}")



_ACCURACY = "Difference in accuracy, mean and 95 % t interval over seeds."
_RISES = "task accuracy of the most parallel heads minus NTP's"
sat = _task(
  "sat", "3-SAT", _ACCURACY, "Huang et al. 2026, arXiv 2604.11912", 0.1,
  ("rises_with_n", "3-SAT: accuracy rises with n", _RISES, most_heads_gain),
)
countdown = _task(
  "countdown", "Countdown", _ACCURACY,
  "task of Gandhi et al. 2024; NextLat, arXiv 2511.05963", 0.02,
  ("rises_with_n", "Countdown: accuracy rises with n", _RISES, most_heads_gain),
)
polynomial = _task(
  "polynomial", "Polynomial arithmetic", _ACCURACY,
  f"{claim.GLOECKLE}, section 4.2", 0.02,
  (
    "beats_ntp", "Polynomials: n = 2 beats NTP in domain",
    "accuracy of n = 2 minus NTP's on as many operations as were trained on",
    two_gain_in_domain,
  ),
)
induction = _task(
  "induction", "Induction: names of two tokens", _ACCURACY,
  f"{claim.GLOECKLE}, section 4.1", 0.1,
  (
    "small_models_gain", "Induction: n = 2 beats n = 1 in the smallest model",
    "task accuracy of n = 2 minus NTP's at the smallest width", two_gain_when_small,
  ),
  (
    "gain_shrinks", "Induction: the gain shrinks with size",
    "this difference at the smallest width minus at the largest", gain_shrinks,
  ),
)
