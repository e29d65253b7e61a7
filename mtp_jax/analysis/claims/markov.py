"""Markov head: the tokens per round that it adds to parallel heads, and its cost."""

import functools

from mtp_jax.analysis.claims import arms, claim
from mtp_jax.analysis.claims.arms import WIDTH
from mtp_jax.analysis.results import REPLICATE, Results

RANK = 256
DSPARK = "DSpark, arXiv 2607.05147"


def experiment(preset: str) -> claim.Experiment:
  rule = f"rank {RANK} minus no table, n = 4, averaged over widths within a seed, "
  return claim.Experiment(
    "markov", preset, "Markov head of parallel heads",
    "What the table of the token before changes in parallel heads n = 4, mean and 95 % "
    "t interval over seeds.",
    (
      *(
        claim.Claim(
          f"{key}_more", f"A Markov head adds {words}",
          f"{DSPARK} has it on a frozen trunk", claim.NO_FIGURE,
          f"{words}, {rule}{claim.PAIRED}", claim.TOKENS,
          functools.partial(difference, metric=f"{measured}_tokens_per_round"),
        )
        for key, words, measured in (
          ("sample", "sampled tokens per round where drafts are drawn",
           "sample_proposal"),
          ("argmax", "sampled tokens per round where drafts are the most likely tokens",
           "argmax_proposal"),
          ("greedy", "greedy tokens per round", "decoded"),
        )
      ),
      claim.Claim(
        "loss_same", "A Markov head leaves the main loss of parallel heads as it is",
        DSPARK, claim.NO_FIGURE,
        f"main loss, {rule}paired by seed, t interval over seeds, within the margin",
        claim.NATS, functools.partial(difference, metric="main_loss", side="within"),
      ),
    ),
  )


def difference(
  results: Results, metric: str, side: claim.Side = "above"
) -> claim.Finding:
  without, own = (
    results.value(metric, arms.parallel(4) | {"mtp.markov_rank": rank}, by=[WIDTH])
    for rank in (0, RANK)
  )
  gains = (own - without).dropna().groupby(list(REPLICATE)).mean()
  return claim.found(gains, f"rank {RANK} minus none", side=side)
