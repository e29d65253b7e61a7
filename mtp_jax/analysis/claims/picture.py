"""The picture of an experiment: its claims' estimates against threshold and margin."""

import textwrap
from typing import Any

import pandas as pd

from mtp_jax.analysis import drawing
from mtp_jax.analysis.claims import claim

_LOOKS = {
  claim.SUPPORTED: {"color": "#0072B2", "marker": "o"},
  claim.OPPOSITE: {"color": "#D55E00", "marker": "X"},
  claim.EQUIVALENT: {"color": "#009E73", "marker": "s"},
  claim.UNDECIDED: {"color": "#555555", "marker": "D", "markerfacecolor": "white"},
  claim.NOT_TESTED: {"color": "#AAAAAA", "marker": "v", "markerfacecolor": "white"},
}


def of(experiment: claim.Experiment, results: Any, *beside: Any) -> claim.Drawing:
  """Returns the experiment's own figure or, without one, the figure of its estimates.

  beside: the results of `experiment.beside`, if there are any.
  """
  if experiment.draw:
    return experiment.draw(results, *beside)
  rows = pd.DataFrame([
    row for own in experiment.claims for row in _rows(own, own.judge(results))
  ])
  panels = list(rows.groupby("within", sort=False))
  heights = [len(own) + 1.5 for _, own in panels]
  figure, axes = drawing.panels(
    len(panels), 1, width=drawing.WIDEST, height=0.42 * sum(heights) + 0.8,
    height_ratios=heights,
  )
  for ax, (within, own) in zip(axes.flat, panels, strict=True):
    ax.use_sticky_edges = False  # Leaves room beside thresholds and margins.
    places = range(len(own))
    ax.barh(
      places, 2 * own["margin"], left=own["threshold"] - own["margin"], height=0.8,
      color="#e4e4e4",
    )
    for place, (_, row) in zip(places, own.iterrows(), strict=True):
      line = row.to_frame().T
      ax.plot([row["threshold"]] * 2, [place - 0.4, place + 0.4], color="#777777")
      ax.errorbar(
        row["mean"], place, xerr=drawing.error_bars(line).astype(float), capsize=3,
        linestyle="none", label=row["verdict"], **_LOOKS[row["verdict"]],
      )
    if "points" in within:  # Shares, and differences of shares.
      low, high = ax.get_xlim()
      ax.set_xlim(max(low, -1.0), min(high, 1.0))
    ax.set_yticks(places, own["label"])
    ax.set_ylim(len(own) - 0.4, -0.6)
    ax.set_xlabel(f"line: threshold; grey: within the margin, {within}")
  drawing.legend_below(figure, axes.flat)
  return figure, rows


def _rows(own: claim.Claim, finding: claim.Finding) -> list[dict[str, Any]]:
  several = len(finding.estimates) > 1
  return [
    {
      "claim": own.key,
      "label": textwrap.fill(
        own.statement + (f": {x.label}" if several else ""), 46
      ),
      "within": str(own.margin), "n": x.n, "mean": x.mean, "low": x.low,
      "high": x.high, "threshold": x.threshold, "margin": x.margin,
      "verdict": claim.NOT_TESTED if own.not_tested else finding.fixed or x.verdict,
    }
    for x in finding.estimates if x.n
  ]
