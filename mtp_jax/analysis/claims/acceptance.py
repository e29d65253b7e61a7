"""Acceptance of drafts by depth, kind, width and text."""

import functools

import pandas as pd

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import WIDTH
from mtp_jax.analysis.results import Results, Where

_TEXT = "data.source"


def experiment(preset: str) -> claim.Experiment:
  over = "differences averaged over widths and texts within a seed"
  accepted = (
    "accepted tokens per pass on Wikipedia, 4 heads, 340M / 1.8B / 7B: parallel 2.15 / "
    "2.27 / 2.39, sequential 2.81 / 2.96 / 3.03"
  )
  return claim.Experiment(
    "acceptance_by_depth", preset, "Acceptance by depth",
    "Differences in the share of drafts accepted, of the drafts that were reached, "
    "sampled at temperature 1; mean and 95 % t interval over seeds.",
    (
      *(
        claim.Claim(
          f"{kind}_falls", f"Acceptance falls from depth 1 to 2: {kind}",
          source, published,
          f"sampled conditional acceptance at depth 1 minus at depth 2, {over}, "
          f"{claim.PAIRED}",
          claim.POINTS, functools.partial(falls, kind=kind),
        )
        for kind, source, published in (
          ("parallel", f"{claim.GLOECKLE}, table S2",
           "tokens per forward on Wikipedia with 2 / 3 / 4 heads, 7B, greedy: 1.88 / "
           "2.57 / 3.12"),
          ("sequential", f"{claim.DEEPSEEK}, section 5.4.3",
           "depth 1 only: 85 to 90 %, sampling not described"),
        )
      ),
      claim.Claim(
        "sequential_more", "Sequential modules accept more than parallel heads",
        f"{claim.TOP}, table 6", accepted,
        f"sequential minus parallel at depth 2 and at depth 3, {over}, {claim.PAIRED}",
        claim.POINTS, sequential_accepts_more,
      ),
      claim.Claim(
        "rises_with_width", "Acceptance rises with size", f"{claim.TOP}, table 6",
        accepted,
        "for both kinds: largest width minus smallest, differences averaged over texts "
        f"and depths within a seed, {claim.PAIRED}",
        claim.POINTS, rises_with_width,
      ),
    ),
  )


def accepted(
  results: Results, kind: str, depth: int, by: tuple[str, ...] = (WIDTH, _TEXT),
  at: Where | None = None,
) -> pd.Series:
  where = {"mtp.kind": kind} | (at or {})
  return results.value("sampled_acceptance", where, depth, by)


def falls(results: Results, kind: str) -> claim.Finding:
  first, second = (accepted(results, kind, depth) for depth in (1, 2))
  return claim.found(first - second, "depth 1 minus depth 2", _texts(results))


def sequential_accepts_more(results: Results) -> claim.Finding:
  return claim.Finding(
    tuple(
      claim.over_seeds(
        accepted(results, "sequential", depth) - accepted(results, "parallel", depth),
        f"depth {depth}",
      )
      for depth in (2, 3)
    ),
    _texts(results),
  )


def rises_with_width(results: Results) -> claim.Finding:
  def at(kind: str, width) -> pd.Series:
    by_depth = {
      depth: accepted(results, kind, depth, (_TEXT,), at={WIDTH: width})
      for depth in (1, 2, 3)
    }
    return pd.concat(by_depth, names=["depth"])

  finding = claim.Finding(
    tuple(
      claim.over_seeds(at(kind, max) - at(kind, min), kind)
      for kind in ("parallel", "sequential")
    ),
    _texts(results),
  )
  is_one = results.trials[WIDTH].nunique() < 2
  return finding.undecided("only one width") if is_one else finding


def _texts(results: Results) -> str:
  """Returns the texts on which drafts were sampled; it is not done on every one."""
  rows = results.measured("sampled_acceptance", {}, 1).dropna(subset="value")
  return f"on {', '.join(sorted(rows[_TEXT].unique()))}" if len(rows) else ""
