"""Repeated text: the gain against the share of documents not held out for test."""

import functools

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import parallel, penalty
from mtp_jax.analysis.results import Results

HELD_OUT = "data.test_fraction"


def experiment(preset: str) -> claim.Experiment:
  return claim.Experiment(
    "data_repetition", preset, "Repeated text",
    "Gain in next-token loss with the most documents minus with the fewest (most "
    "epochs); mean and 95 % t interval over seeds.",
    tuple(
      claim.Claim(
        f"shrinks_{n}", f"Repetition shrinks the gain of n = {n}",
        f"{claim.GLOECKLE}, table 1", published,
        "NTP's main loss minus that of the parallel heads, with the most documents "
        f"minus with the fewest (most epochs), {claim.PAIRED}",
        claim.NATS, functools.partial(repetition_shrinks_gain, n=n),
      )
      for n, published in (
        (2, claim.NO_FIGURE),
        (4, "pass rates only, 7B, gain in MBPP pass@1: +3.8 points at 0.8 epochs "
            "(200B tokens), +2.4 at 4 epochs (1T tokens)"),
      )
    ),
  )


def repetition_shrinks_gain(results: Results, n: int) -> claim.Finding:
  most, least = (penalty(results, parallel(n), {HELD_OUT: end}) for end in (max, min))
  finding = claim.found(most - least, "gain at least minus at most epochs")
  if results.trials[HELD_OUT].nunique() < 2:
    return finding.undecided("only one amount of text")
  return finding
