"""What a sequential module is fed: its hidden state, the norm, the embedding."""

import pandas as pd

from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import sequential
from mtp_jax.analysis.results import Results


def experiment(preset: str) -> claim.Experiment:
  rule = "sequential D = 2; sampled conditional acceptance"
  return claim.Experiment(
    "hidden_source", preset, "What a sequential module is fed",
    "Differences in acceptance and in next-token loss, mean and 95 % t interval over "
    "seeds.",
    (
      claim.Claim(
        "chained_more", "A chained state drafts the second token better", claim.OWN,
        "nothing", f"{rule} at depth 2, chained minus trunk, {claim.PAIRED}",
        claim.POINTS,
        lambda results: claim.found(
          accepted(results, 2, hidden="chained") - accepted(results, 2, hidden="trunk"),
          "chained minus trunk",
        ),
      ),
      claim.Claim(
        "embedding_helps", "Without the embedding the first draft is worse", claim.OWN,
        "nothing", f"{rule} at depth 1, fed true minus fed none, {claim.PAIRED}",
        claim.POINTS,
        lambda results: claim.found(
          accepted(results, 1, fed="true") - accepted(results, 1, fed="none"),
          "with minus without",
        ),
      ),
      claim.Claim(
        "norm_is_neutral", "The norm before or after makes no difference to the loss",
        claim.OWN, "nothing",
        "main loss, hidden_norm before minus after, averaged over chained and trunk "
        "within a seed, t interval over seeds, within the margin", claim.NATS,
        lambda results: claim.found(
          loss(results, "before") - loss(results, "after"), "before minus after",
          side="within",
        ),
      ),
    ),
  )


def accepted(
  results: Results, depth: int, hidden: str = "chained", fed: str = "true"
) -> pd.Series:
  where = {"mtp.hidden": hidden, "mtp.hidden_norm": "after", "mtp.fed": fed}
  return results.value("sampled_acceptance", sequential(2) | where, depth)


def loss(results: Results, norm: str) -> pd.Series:
  where = {"mtp.hidden_norm": norm, "mtp.fed": "true"}
  return results.value("main_loss", sequential(2) | where, by=["mtp.hidden"])
