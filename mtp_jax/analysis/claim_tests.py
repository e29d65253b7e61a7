"""How each claim is tested: results of an experiment in, a finding out.

Every test compares arms by their config values; `claims.py` says in words what it does.
`parallel(n)` predicts n tokens at once, the next one included, as in Gloeckle et al.
2024; `sequential(depth)` predicts so many extra tokens, as in DeepSeek-V3.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pandas as pd

from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE, LadderResults, Results
from mtp_jax.analysis.rules import (
  Estimate,
  Finding,
  by_key,
  decide,
  mean_over_seeds,
  paired,
  share,
  undecided,
)
from mtp_jax.analysis.runs import RunsError

SOLVED = 0.95  # Of exact paths.
AT_CHANCE = 0.1  # Distance from 1 / arms.
KEEPS_DRAFTS = 0.9  # Of the tokens per round with a constant lambda.

Where = dict[str, Any]
NTP: Where = {"mtp.kind": "none"}
WIDTH = "trunk.embed_dim"
TEXT = "data.source"
REPETITION = "data.test_fraction"
SCHEDULE_ARMS: dict[str, Where] = {
  "constant": {"mtp.schedule": "constant", "mtp.curriculum": "none"},
  "piecewise": {"mtp.schedule": "piecewise", "mtp.curriculum": "none"},
  "anneal": {"mtp.schedule": "anneal", "mtp.curriculum": "none"},
  "forward": {"mtp.schedule": "constant", "mtp.curriculum": "forward"},
  "reverse": {"mtp.schedule": "constant", "mtp.curriculum": "reverse"},
}


def parallel(n: int) -> Where:
  return {"mtp.kind": "parallel", "mtp.depth": n - 1}


def sequential(depth: int) -> Where:
  return {"mtp.kind": "sequential", "mtp.depth": depth}


def is_solved(rows: pd.DataFrame) -> pd.Series:
  return rows["value"] >= SOLVED


def is_unsolved(rows: pd.DataFrame) -> pd.Series:
  return rows["value"] < SOLVED


def is_at_chance(rows: pd.DataFrame) -> pd.Series:
  return (rows["value"] - 1 / rows["task.star_graph.arms"]).abs() <= AT_CHANCE


def star_graph_rows(results: Results, where: Where) -> pd.DataFrame:
  """Returns the accuracy of trials whose modules are fed as in DeepSeek-V3."""
  for key in ("arms", "length", "reversed"):
    results.key(f"task.star_graph.{key}")
  # Results from before there was a choice have the true tokens only.
  fed = {"mtp.fed": "true"} if "mtp.fed" in results.trials else {}
  return results.measured("task_accuracy", fed | where).dropna(subset="value")


def share_of_seeds(
  results: Results, where: Where, outcome: Callable[[pd.DataFrame], pd.Series]
) -> Finding:
  """Tests whether most seeds end so, on one graph."""
  rows = star_graph_rows(results, where)
  by_key(rows, REPLICATE)  # Every seed counts once.
  return decide([share(outcome(rows))])


def every_seed_solves(results: Results, where: Where) -> Finding:
  """Tests a control of few seeds: all of them, none of them, or not decided."""
  finding = share_of_seeds(results, where, is_solved)
  mean = finding.estimates[0].mean
  return Finding(finding.estimates, {1.0: True, 0.0: False}.get(mean))


def task_rows(results: Results, where: Where) -> pd.DataFrame:
  return results.measured("task_accuracy", where)


def in_domain_rows(results: Results, where: Where) -> pd.DataFrame:
  """Returns the accuracy on as many operations as were trained on, or fewer."""
  results.key("task.polynomial.max_operators")
  rows = results.select(where)
  groups = operator_rows(results, where)
  groups = groups[groups["operators"] <= groups["task.polynomial.max_operators"]]
  correct = (groups["value"] * groups["count"]).groupby(groups["trial"]).sum()
  count = groups.groupby("trial")["count"].sum()
  return rows.assign(value=rows["trial"].map(correct / count).astype(float))


def operator_rows(results: Results, where: Where) -> pd.DataFrame:
  """Returns the accuracy by number of operations: columns operators, value, count."""
  pattern = re.compile(r"task_accuracy:operators=(\d+)")
  metrics = results.metrics
  operators = metrics["metric"].str.extract(pattern, expand=False)
  groups = metrics[operators.notna()].assign(operators=operators.dropna().astype(int))
  groups = groups[["trial", "operators", "mean", "count"]]
  return results.select(where).merge(groups.rename(columns={"mean": "value"}))


def gains_on_task(
  results: Results,
  floor: float,
  n: int | None = None,
  rows: Callable[[Results, Where], pd.DataFrame] = task_rows,
) -> Finding:
  """Tests whether parallel heads answer more than NTP; n None: the most heads."""
  heads = results.select({"mtp.kind": "parallel"})["mtp.depth"]
  n = n or int(heads.max() + 1 if len(heads) else 2)
  difference = paired(rows(results, parallel(n)), rows(results, NTP))
  finding = decide([mean_over_seeds(difference, f"n={n} minus NTP")])
  return _unless_nothing_was_learnt(finding, rows(results, {}), floor)


def induction_gain(results: Results, floor: float) -> Finding:
  """Tests whether n = 2 is better than NTP at the smallest width."""
  small = results.trials[results.key(WIDTH)].min()
  difference = _task_gain_at(results, small)
  finding = decide([mean_over_seeds(difference, f"width {small}, n=2 minus NTP")])
  return _unless_nothing_was_learnt(finding, task_rows(results, {WIDTH: small}), floor)


def induction_gain_shrinks(results: Results, floor: float) -> Finding:
  """Tests whether that gain is smaller at the largest width."""
  widths = results.trials[results.key(WIDTH)]
  small, large = widths.min(), widths.max()
  change = _task_gain_at(results, small) - _task_gain_at(results, large)
  finding = decide([mean_over_seeds(change, f"gain at {small} minus gain at {large}")])
  if small == large:
    return undecided(finding, "only one width")
  return _unless_nothing_was_learnt(finding, task_rows(results, {}), floor)


def acceptance_falls(results: Results, kind: str) -> Finding:
  """Tests whether the second draft is accepted less often than the first."""
  first, second = (acceptance_rows(results, {"mtp.kind": kind}, k) for k in (1, 2))
  difference = paired(first, second, (results.key(WIDTH), TEXT))
  return decide([mean_over_seeds(difference, "depth 1 minus depth 2")], _texts(results))


def sequential_accepts_more(results: Results) -> Finding:
  """Tests whether modules draft better than heads, at depth 2 and at depth 3."""
  estimates = []
  for depth in (2, 3):
    kinds = ("sequential", "parallel")
    rows = (acceptance_rows(results, {"mtp.kind": kind}, depth) for kind in kinds)
    difference = paired(*rows, (results.key(WIDTH), TEXT))
    estimates.append(mean_over_seeds(difference, f"depth {depth}"))
  return decide(estimates, _texts(results))


def acceptance_rises(results: Results) -> Finding:
  """Tests whether the widest model's drafts are accepted most, for either kind."""
  widths = results.trials[results.key(WIDTH)]
  estimates = []
  for kind in ("parallel", "sequential"):
    large, small = (
      pd.concat([
        acceptance_rows(results, {"mtp.kind": kind, WIDTH: width}, k).assign(at_depth=k)
        for k in (1, 2, 3)
      ])
      for width in (widths.max(), widths.min())
    )
    difference = paired(large, small, (TEXT, "at_depth"))
    estimates.append(mean_over_seeds(difference, kind))
  finding = decide(estimates, _texts(results))
  if widths.nunique() < 2:
    return undecided(finding, "only one width")
  return finding


def acceptance_rows(results: Results, where: Where, at_depth: int) -> pd.DataFrame:
  return results.measured("sampled_acceptance", where, at_depth)


def _texts(results: Results) -> str:
  """Says on which texts drafts were sampled; it is not done on every one."""
  texts = acceptance_rows(results, {}, 1).dropna(subset="value")[TEXT].unique()
  return f"on {', '.join(sorted(texts))}" if len(texts) else ""


def penalty(results: Results, where: Where) -> pd.Series:
  """Returns what an arm costs in next-token loss, a seed: its loss minus NTP's."""
  return paired(
    results.measured("main_loss", where), results.measured("main_loss", NTP)
  )


def closes_half_of_penalty(results: Results, arm: str) -> Finding:
  """Tests whether a schedule leaves less than half of the constant lambda's penalty."""
  constant = penalty(results, parallel(4) | SCHEDULE_ARMS["constant"])
  own = penalty(results, parallel(4) | SCHEDULE_ARMS[arm])
  left = mean_over_seeds(
    own - constant / 2, f"penalty of {arm} minus half of constant's", side="below"
  )
  whole = mean_over_seeds(constant)
  finding = decide([left], f"penalty of constant {whole}")
  if whole.holds is not True:
    return undecided(finding, f"no penalty to close: that of constant is {whole}")
  return finding


def forward_keeps_drafts(results: Results) -> Finding:
  """Tests which curricula keep the tokens per round of a constant lambda."""
  rounds = {
    arm: by_key(
      results.measured("sampled_tokens_per_round", parallel(4) | SCHEDULE_ARMS[arm]),
      REPLICATE,
    )
    for arm in ("constant", "forward", "anneal", "reverse")
  }
  sides: dict[str, Literal["above", "below"]] = {
    "forward": "above", "anneal": "below", "reverse": "below",
  }
  return decide([
    mean_over_seeds(
      rounds[arm] / rounds["constant"], f"{arm} / constant", KEEPS_DRAFTS, side, sign=""
    )
    for arm, side in sides.items()
  ])


def bytes_pay_less(results: Results, n: int) -> Finding:
  """Tests whether n heads cost fewer bits per byte on bytes than on BPE tokens."""
  bpe, own = (bits_penalty(results, kind, n) for kind in ("bpe", "bytes"))
  return decide([mean_over_seeds(bpe - own, "penalty on BPE minus penalty on bytes")])


def bits_penalty(results: Results, tokenizer: str, n: int) -> pd.Series:
  """Returns bits per byte of n heads minus those of NTP, a seed."""
  where = {"tokenizer.kind": tokenizer}
  return paired(
    results.measured("bits_per_byte", where | parallel(n)),
    results.measured("bits_per_byte", where | NTP),
  )


def repetition_shrinks_gain(results: Results, n: int) -> Finding:
  """Tests whether the gain in loss is smaller where the text is repeated most."""
  fractions = results.trials[results.key(REPETITION)]
  once, most = (
    repetition_gain(results, n, fraction)
    for fraction in (fractions.min(), fractions.max())
  )
  finding = decide([mean_over_seeds(once - most, "gain at least minus at most epochs")])
  if fractions.nunique() < 2:
    return undecided(finding, "only one amount of text")
  return finding


def repetition_gain(results: Results, n: int, fraction: float) -> pd.Series:
  """Returns the gain of n heads, a seed, with this share of documents held out."""
  at = {REPETITION: fraction}
  return paired(
    results.measured("main_loss", NTP | at),
    results.measured("main_loss", parallel(n) | at),
  )


def hidden_arm(
  hidden: str = "chained", norm: str = "after", fed: str = "true"
) -> Where:
  return sequential(2) | {
    "mtp.hidden": hidden, "mtp.hidden_norm": norm, "mtp.fed": fed,
  }


def chained_accepts_more(results: Results) -> Finding:
  """Tests whether a chained state drafts the second token better than the trunk's."""
  chained, trunk = (
    acceptance_rows(results, hidden_arm(x), 2) for x in ("chained", "trunk")
  )
  return decide([mean_over_seeds(paired(chained, trunk), "chained minus trunk")])


def embedding_helps(results: Results) -> Finding:
  """Tests whether the first draft is worse without the embedding of its token."""
  fed, unfed = (
    acceptance_rows(results, hidden_arm(fed=x), 1) for x in ("true", "none")
  )
  return decide([mean_over_seeds(paired(fed, unfed), "with minus without")])


def norm_does_not_matter(results: Results) -> Finding:
  """Tests whether the main loss is the same with the state from before the norm."""
  before, after = (
    pd.concat([
      results.measured("main_loss", hidden_arm(hidden, norm))
      for hidden in ("chained", "trunk")
    ])
    for norm in ("before", "after")
  )
  difference = paired(before, after, ("mtp.hidden",))
  return decide([mean_over_seeds(difference, "before minus after", side="around")])


def heads_cost_loss(results: LadderResults) -> Finding:
  """Tests whether parallel heads of weight 1 lose to NTP, at every size and depth."""
  return decide([
    mean_over_seeds(gains, f"D={depth}, {size_text(size)}", side="below")
    for depth in (1, 3)
    for size, gains in _ladder_gains(results, "parallel", depth)
  ])


def more_heads_cost_more(results: LadderResults) -> Finding:
  """Tests whether three extra heads lose more than one, at every size."""
  three = dict(_ladder_gains(results, "parallel", 3))
  one = dict(_ladder_gains(results, "parallel", 1))
  return decide([
    mean_over_seeds(three[size] - one[size], f"D=3 minus D=1, {size_text(size)}",
                    side="below")
    for size in sorted(three.keys() & one.keys())
  ])


def gain_grows_with_size(results: LadderResults, kind: str, depth: int) -> Finding:
  """Tests the slope of the gain at equal tokens, per decade of parameters."""
  fits = at_equal_tokens(results.slopes, kind, depth)
  if len(fits) > 1:
    raise RunsError(
      f"{results.folder / 'all_slopes.csv'}: {kind} with depth {depth} must have one "
      f"row for main_loss at equal tokens, got {len(fits)}."
    )
  return decide([
    Estimate(
      "per decade",
      f"{row['slope']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
      int(row["n"]), row["slope"], row["low"], row["high"],
    )
    for _, row in fits.iterrows()
  ] or [mean_over_seeds(pd.Series(dtype=float))])


def at_equal_tokens(table: pd.DataFrame, kind: str, depth: int) -> pd.DataFrame:
  """Returns the rows of a ladder's table for the main loss of one kind and depth."""
  return table[
    (table["metric"] == "main_loss") & (table["comparison"] == "tokens")
    & (table["kind"] == kind) & (table["depth"] == depth) & (table["arm"] == "added")
  ]


def ladder_pairs(results: LadderResults, kind: str, depth: int) -> pd.DataFrame:
  """Returns the gains a seed of methods that more than one size was trained with."""
  methods = at_equal_tokens(results.slopes, kind, depth)["method"]
  pairs = at_equal_tokens(results.pairs, kind, depth)
  return pairs[pairs["method"].isin(methods)]


def _ladder_gains(
  results: LadderResults, kind: str, depth: int
) -> Sequence[tuple[float, pd.Series]]:
  """Returns (size, gain a seed) from the smallest size up."""
  pairs = ladder_pairs(results, kind, depth)
  seed = ["seed", "data_seed"]
  return [(size, cell.set_index(seed)["gain"]) for size, cell in pairs.groupby("size")]


def _task_gain_at(results: Results, width: int) -> pd.Series:
  at = {WIDTH: width}
  return paired(task_rows(results, parallel(2) | at), task_rows(results, NTP | at))


def _unless_nothing_was_learnt(
  finding: Finding, rows: pd.DataFrame, floor: float
) -> Finding:
  """Returns the finding, undecided if no arm's mean accuracy reaches the floor."""
  arms = rows.dropna(subset="value").groupby(["mtp.kind", "mtp.depth"])["value"].mean()
  if len(arms) and arms.max() < floor:
    best = f"the best mean accuracy is {arms.max():.3f}, below {floor:g}"
    return undecided(finding, f"no arm has learnt the task: {best}")
  return finding
