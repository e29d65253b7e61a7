"""Schedules of lambda: what they cost in next-token loss, which drafts they keep."""

import functools

import pandas as pd

from mtp_jax.analysis.claims import arms
from mtp_jax.analysis.claims.claim import (
  AYNETDINOV,
  NO_FIGURE,
  Claim,
  Drawing,
  Experiment,
)
from mtp_jax.analysis.drawing import (
  COLOURS,
  error_bars,
  legend_below,
  panels,
  series_marker,
  zero_line,
)
from mtp_jax.analysis.results import REPLICATE, Results
from mtp_jax.analysis.rules import (
  NATS,
  Finding,
  Margin,
  Side,
  by_key,
  mean_over_seeds,
  undecided,
)
from mtp_jax.analysis.statistics import interval

KEEPS_DRAFTS = 0.9  # Of the tokens per round with a constant lambda.
SCHEDULES: dict[str, arms.Where] = {
  "constant": {"mtp.schedule": "constant", "mtp.curriculum": "none"},
  "piecewise": {"mtp.schedule": "piecewise", "mtp.curriculum": "none"},
  "anneal": {"mtp.schedule": "anneal", "mtp.curriculum": "none"},
  "forward": {"mtp.schedule": "constant", "mtp.curriculum": "forward"},
  "reverse": {"mtp.schedule": "constant", "mtp.curriculum": "reverse"},
}


def experiment(preset: str) -> Experiment:
  return Experiment(
    "schedules", preset, "Schedules of lambda",
    "What a schedule costs in next-token loss against the tokens per round that it "
    "keeps; mean and 95 % t interval over seeds.",
    (
      *(
        Claim(
          f"{arm}_closes_half", f"Half of the next-token penalty is closed by {arm}",
          AYNETDINOV, NO_FIGURE,
          "parallel n = 4; penalty of the schedule minus half of the constant's, "
          "paired by seed, t interval over seeds, below 0; undecided if the constant's "
          "own penalty is not above 0",
          NATS, functools.partial(closes_half_of_penalty, arm=arm),
        )
        for arm in ("anneal", "reverse")
      ),
      Claim(
        "forward_keeps_drafts", "Of the curricula only forward keeps the drafts",
        AYNETDINOV, NO_FIGURE,
        "parallel n = 4; sampled tokens per round over those of the constant lambda, "
        f"by seed, t interval over seeds: above {KEEPS_DRAFTS:g} for forward, below it "
        "for anneal and reverse",
        Margin(0.05, "of the constant lambda's"), forward_keeps_drafts,
      ),
    ),
    draw,
  )


def closes_half_of_penalty(results: Results, arm: str) -> Finding:
  """Tests whether a schedule leaves less than half of the constant lambda's penalty."""
  constant = arms.penalty(results, arms.parallel(4) | SCHEDULES["constant"])
  own = arms.penalty(results, arms.parallel(4) | SCHEDULES[arm])
  left = mean_over_seeds(
    own - constant / 2, f"penalty of {arm} minus half of constant's", side="below"
  )
  whole = mean_over_seeds(constant)
  if not whole.low > 0:
    return undecided(Finding((left,)), f"no penalty to close: constant's is {whole}")
  return Finding((left,), f"penalty of constant {whole}")


def forward_keeps_drafts(results: Results) -> Finding:
  """Tests which curricula keep the tokens per round of a constant lambda."""
  rounds = {
    arm: by_key(
      results.measured("sampled_tokens_per_round", arms.parallel(4) | SCHEDULES[arm]),
      REPLICATE,
    )
    for arm in ("constant", "forward", "anneal", "reverse")
  }
  sides: dict[str, Side] = {"forward": "above", "anneal": "below", "reverse": "below"}
  return Finding(tuple(
    mean_over_seeds(
      rounds[arm] / rounds["constant"], f"{arm} / constant", KEEPS_DRAFTS, side, sign=""
    )
    for arm, side in sides.items()
  ))


def draw(results: Results) -> Drawing:
  """Penalty against tokens per round, one point a schedule."""
  figure, axes = panels(1, 1, width=6.5, height=4.2)
  ax = axes[0, 0]
  table = []
  for base in (arms.parallel(4), arms.sequential(1)):
    for index, (arm, where) in enumerate(SCHEDULES.items()):
      rounds = results.measured("sampled_tokens_per_round", base | where)["value"]
      over = {
        "penalty": interval(arms.penalty(results, base | where).dropna()),
        "rounds": interval(rounds.dropna()),
      }
      if not over["penalty"]["n"] or not over["rounds"]["n"]:
        continue
      x, y = (pd.DataFrame([over[key]]) for key in ("penalty", "rounds"))
      method = arms.label(base["mtp.kind"], base["mtp.depth"])
      ax.errorbar(
        x["mean"], y["mean"], xerr=error_bars(x), yerr=error_bars(y), capsize=3,
        color=COLOURS[base["mtp.kind"]], marker=series_marker(index), markersize=8,
        markerfacecolor="white", elinewidth=0.7, linestyle="none",
        label=f"{method}, {arm}",
      )
      table.append({"method": method, "arm": arm} | {
        f"{name}_{key}": value
        for name, values in over.items() for key, value in values.items()
      })
  zero_line(ax, "x")
  ax.set(
    xlabel="next-token loss minus NTP's, nats", ylabel="sampled tokens per round"
  )
  legend_below(figure, axes.flat)
  return figure, pd.DataFrame(table)
