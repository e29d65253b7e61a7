"""The path of a star graph: which ways of predicting solve it, and how soon."""

import functools
from collections.abc import Callable, Iterator

import pandas as pd

from mtp_jax.analysis.claims import arms, claim, solving
from mtp_jax.analysis.published import STAR_GRAPHS
from mtp_jax.analysis.results import REPLICATE, Results, Where, by_key

EASIER = "cpu_8_labels"  # NTP and n = 2 alone.
SOLVED = solving.SOLVED
AT_CHANCE = 0.1  # Distance from 1 / arms.
_BACHMANN = "Bachmann and Nagarajan 2024, arXiv 2403.06963"
_SHARE = "Wilson interval of the share of such seeds, above 1/2"


def experiment(preset: str) -> claim.Experiment:
  graphs = ((2, 3),) if preset in ("cpu", EASIER) else tuple(STAR_GRAPHS)
  claims = [own for graph in graphs for own in _claims(*graph)]
  if preset == EASIER:
    kept = ("none0", "parallel1", "sooner_parallel1")
    claims = [x for x in claims if x.key in [f"{key}_2_3" for key in kept]]
  return claim.Experiment(
    "star_graph", preset, "The path of a star graph",
    "Share of seeds that end as claimed, of exact paths decoded freely; and the tokens "
    "saved until the path is solved.",
    tuple(claims),
  )


def _claims(num_arms: int, length: int) -> Iterator[claim.Claim]:
  # The table has no G(2,3): of its graphs G(3,3) is the smallest.
  cells = STAR_GRAPHS.get((num_arms, length), STAR_GRAPHS[3, 3])
  of = "" if (num_arms, length) in STAR_GRAPHS else "G(3,3): "
  graph = f"G({num_arms},{length})"
  on_graph = {"task.star_graph.arms": num_arms, "task.star_graph.length": length}
  forward = on_graph | {"task.star_graph.reversed": False}
  for (kind, depth), percent in cells.items():
    method = arms.label(kind, depth)
    where = forward | {"mtp.kind": kind, "mtp.depth": depth}
    source = f"{_BACHMANN}; {claim.TOP}, table 5"
    published = f"{of}{percent:g} % exact paths"
    if depth == 0 and percent > 1:
      outcome, verb = is_at_chance, "stays at chance"
      rule = f"a seed is at chance within {AT_CHANCE:g} of 1/{num_arms}"
    elif percent > 100 * SOLVED:
      outcome, verb = is_solved, "solves it"
      rule = f"a seed solves it from {SOLVED:g} of exact paths"
    else:
      outcome, verb = is_unsolved, "fails"
      rule = f"a seed fails below {SOLVED:g} of exact paths"
    yield claim.Claim(
      f"{kind}{depth}_{num_arms}_{length}", f"{graph}: {method} {verb}", source,
      f"{published} (one run)", f"{rule}; {_SHARE}", claim.POINTS,
      functools.partial(share_of_seeds, where=where, outcome=outcome),
    )
    if where == where | arms.parallel(1 + depth):
      yield claim.Claim(
        f"sooner_{kind}{depth}_{num_arms}_{length}",
        f"{graph}: {method} learns it in fewer tokens than NTP", source,
        f"{published}, NTP {cells['none', 0]:g} % (one run)",
        f"{solving.RULE}, above 0", claim.FACTOR,
        functools.partial(solving.sooner, where=where, ntp=forward | arms.NTP),
      )
  yield claim.Claim(
    f"reversed_{num_arms}_{length}", f"{graph}: NTP solves the reversed path",
    _BACHMANN, claim.NO_FIGURE,
    f"a control of few seeds: supported if all reach {SOLVED:g} of exact paths, "
    "opposite if none does",
    claim.POINTS,
    functools.partial(
      every_seed_solves, where=on_graph | arms.NTP | {"task.star_graph.reversed": True}
    ),
  )


def is_solved(rows: pd.DataFrame) -> pd.Series:
  return rows["value"] >= SOLVED


def is_unsolved(rows: pd.DataFrame) -> pd.Series:
  return rows["value"] < SOLVED


def is_at_chance(rows: pd.DataFrame) -> pd.Series:
  return (rows["value"] - 1 / rows["task.star_graph.arms"]).abs() <= AT_CHANCE


def accuracy(results: Results, where: Where) -> pd.DataFrame:
  """Returns the accuracy of trials whose modules are fed as in DeepSeek-V3."""
  for key in ("arms", "length", "reversed"):
    results.key(f"task.star_graph.{key}")
  # Results from before there was a choice have the true tokens only.
  fed = {"mtp.fed": "true"} if "mtp.fed" in results.trials else {}
  return results.measured("task_accuracy", fed | where).dropna(subset="value")


def share_of_seeds(
  results: Results,
  where: Where,
  outcome: Callable[[pd.DataFrame], pd.Series],
) -> claim.Finding:
  """Tests whether most seeds end so, on one graph."""
  rows = accuracy(results, where)
  by_key(rows, REPLICATE)  # Every seed counts once.
  return claim.Finding((claim.share(outcome(rows)),))


def every_seed_solves(results: Results, where: Where) -> claim.Finding:
  """Tests a control of few seeds: all of them, none of them, or undecided."""
  finding = share_of_seeds(results, where, is_solved)
  verdicts = {1.0: claim.SUPPORTED, 0.0: claim.OPPOSITE}
  mean = finding.estimates[0].mean
  return claim.Finding(finding.estimates, fixed=verdicts.get(mean, claim.UNDECIDED))
