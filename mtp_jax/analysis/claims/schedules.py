"""Schedules of lambda: what they cost in next-token loss, which drafts they keep."""

import functools

import pandas as pd

from mtp_jax.analysis.claims import arms, claim
from mtp_jax.analysis.results import Results, Where

KEEPS_DRAFTS = 0.9  # Of the tokens per round with a constant lambda.
SCHEDULES: dict[str, Where] = {
  name: {"mtp.schedule": schedule, "mtp.curriculum": curriculum}
  for name, schedule, curriculum in (
    ("constant", "constant", "none"), ("piecewise", "piecewise", "none"),
    ("anneal", "anneal", "none"), ("forward", "constant", "forward"),
    ("reverse", "constant", "reverse"),
  )
}


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "schedules", preset, "Schedules of lambda",
    "What a schedule costs in next-token loss, and the tokens per round that it keeps; "
    "mean and 95 % t interval over seeds.",
    (
      *(
        claim.Claim(
          f"{arm}_closes_half", f"Half of the next-token penalty is closed by {arm}",
          claim.AYNETDINOV, claim.NO_FIGURE,
          "parallel n = 4; penalty of the schedule minus half of the constant's, "
          "paired by seed, t interval over seeds, below 0; undecided if the constant's "
          "own penalty is not above 0",
          claim.NATS, functools.partial(closes_half_of_penalty, arm=arm),
        )
        for arm in ("anneal", "reverse")
      ),
      claim.Claim(
        "forward_keeps_drafts", "Of the curricula only forward keeps the drafts",
        claim.AYNETDINOV, claim.NO_FIGURE,
        "parallel n = 4; sampled tokens per round over those of the constant lambda, "
        f"by seed, t interval over seeds: above {KEEPS_DRAFTS:g} for forward, below it "
        "for anneal and reverse",
        claim.Margin(0.05, "of the constant lambda's"), forward_keeps_drafts,
      ),
    ),
  )


def rounds(results: Results, method: Where, arm: str) -> pd.Series:
  return results.value("sampled_tokens_per_round", method | SCHEDULES[arm])


def closes_half_of_penalty(results: Results, arm: str) -> claim.Finding:
  constant, own = (
    arms.penalty(results, arms.parallel(4) | SCHEDULES[x]) for x in ("constant", arm)
  )
  left = claim.over_seeds(
    own - constant / 2, f"penalty of {arm} minus half of constant's", side="below"
  )
  whole = claim.over_seeds(constant)
  if not whole.low > 0:
    why = f"no penalty to close: constant's is {whole}"
    return claim.Finding((left,)).undecided(why)
  return claim.Finding((left,), f"penalty of constant {whole}")


def forward_keeps_drafts(results: Results) -> claim.Finding:
  sides = {"forward": "above", "anneal": "below", "reverse": "below"}
  own = functools.partial(rounds, results, arms.parallel(4))
  return claim.Finding(tuple(
    claim.over_seeds(
      own(arm) / own("constant"), f"{arm} / constant", threshold=KEEPS_DRAFTS,
      side=side, sign="",
    )
    for arm, side in sides.items()
  ))
