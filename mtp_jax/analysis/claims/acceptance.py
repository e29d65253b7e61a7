"""Acceptance of drafts by depth, kind, width and text."""

import functools

import pandas as pd

from mtp_jax.analysis.claims.arms import WIDTH, Where
from mtp_jax.analysis.claims.claim import (
  DEEPSEEK,
  GLOECKLE,
  PAIRED,
  TOP,
  Claim,
  Drawing,
  Experiment,
)
from mtp_jax.analysis.claims.pictures import lines, with_method
from mtp_jax.analysis.drawing import legend_below, panels, share_axis
from mtp_jax.analysis.results import Results
from mtp_jax.analysis.rules import POINTS, Finding, mean_over_seeds, paired, undecided

_TEXT = "data.source"


def experiment(preset: str) -> Experiment:
  over = "differences averaged over widths and texts within a seed"
  accepted = (
    "accepted tokens per pass on Wikipedia, 4 heads, 340M / 1.8B / 7B: parallel 2.15 / "
    "2.27 / 2.39, sequential 2.81 / 2.96 / 3.03"
  )
  return Experiment(
    "acceptance_by_depth", preset, "Acceptance by depth",
    "Share of drafts accepted, of those that were reached; sampled at temperature 1; "
    "mean and 95 % t interval over seeds.",
    (
      *(
        Claim(
          f"{kind}_falls", f"Acceptance falls from depth 1 to 2: {kind}",
          source, published,
          f"sampled conditional acceptance at depth 1 minus at depth 2, {over}, "
          f"{PAIRED}",
          POINTS, functools.partial(falls, kind=kind),
        )
        for kind, source, published in (
          ("parallel", f"{GLOECKLE}, table S2",
           "tokens per forward on Wikipedia with 2 / 3 / 4 heads, 7B, greedy: 1.88 / "
           "2.57 / 3.12"),
          ("sequential", f"{DEEPSEEK}, section 5.4.3",
           "depth 1 only: 85 to 90 %, sampling not described"),
        )
      ),
      Claim(
        "sequential_more", "Sequential modules accept more than parallel heads",
        f"{TOP}, table 6", accepted,
        f"sequential minus parallel at depth 2 and at depth 3, {over}, {PAIRED}",
        POINTS, sequential_accepts_more,
      ),
      Claim(
        "rises_with_width", "Acceptance rises with size", f"{TOP}, table 6", accepted,
        "for both kinds: largest width minus smallest, differences averaged over texts "
        f"and depths within a seed, {PAIRED}",
        POINTS, rises_with_width,
      ),
    ),
    draw,
  )


def rows_at(results: Results, where: Where, at_depth: int) -> pd.DataFrame:
  return results.measured("sampled_acceptance", where, at_depth)


def falls(results: Results, kind: str) -> Finding:
  """Tests whether the second draft is accepted less often than the first."""
  first, second = (rows_at(results, {"mtp.kind": kind}, k) for k in (1, 2))
  difference = paired(first, second, (results.key(WIDTH), _TEXT))
  return Finding(
    (mean_over_seeds(difference, "depth 1 minus depth 2"),), _texts(results)
  )


def sequential_accepts_more(results: Results) -> Finding:
  """Tests whether modules draft better than heads, at depth 2 and at depth 3."""
  estimates = []
  for depth in (2, 3):
    kinds = ("sequential", "parallel")
    rows = (rows_at(results, {"mtp.kind": kind}, depth) for kind in kinds)
    difference = paired(*rows, (results.key(WIDTH), _TEXT))
    estimates.append(mean_over_seeds(difference, f"depth {depth}"))
  return Finding(tuple(estimates), _texts(results))


def rises_with_width(results: Results) -> Finding:
  """Tests whether the widest model's drafts are accepted most, for either kind."""
  widths = results.trials[results.key(WIDTH)]
  estimates = []
  for kind in ("parallel", "sequential"):
    large, small = (
      pd.concat([
        rows_at(results, {"mtp.kind": kind, WIDTH: width}, k).assign(at_depth=k)
        for k in (1, 2, 3)
      ])
      for width in (widths.max(), widths.min())
    )
    estimates.append(mean_over_seeds(paired(large, small, (_TEXT, "at_depth")), kind))
  finding = Finding(tuple(estimates), _texts(results))
  return undecided(finding, "only one width") if widths.nunique() < 2 else finding


def _texts(results: Results) -> str:
  """Names the texts on which drafts were sampled; it is not done on every one."""
  texts = rows_at(results, {}, 1).dropna(subset="value")[_TEXT].unique()
  return f"on {', '.join(sorted(texts))}" if len(texts) else ""


def draw(results: Results) -> Drawing:
  """Conditional acceptance by depth, one panel a text."""
  results.key(WIDTH)
  rows = with_method(
    pd.concat([
      rows_at(results, {}, k).assign(at_depth=k) for k in (1, 2, 3)
    ]).dropna(subset="value")
  )
  texts = list(rows[_TEXT].unique())
  figure, axes = panels(1, max(len(texts), 1), sharey=True)
  tables = []
  for ax, text in zip(axes.flat, texts, strict=False):
    own = rows[rows[_TEXT] == text]
    own = own.assign(width="width " + own[WIDTH].astype(str))
    tables.append(lines(ax, own, "at_depth", ["method", "width"]).assign(text=text))
    ax.set(title=text, xlabel="depth of the draft", xticks=(1, 2, 3))
    share_axis(ax)
  axes[0, 0].set_ylabel("conditional acceptance")
  legend_below(figure, axes.flat)
  return figure, pd.concat(tables) if tables else rows
