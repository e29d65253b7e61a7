"""What a sequential module is fed: its hidden state, the norm, the embedding."""

import pandas as pd

from mtp_jax.analysis import drawing
from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import sequential
from mtp_jax.analysis.claims.pictures import dots
from mtp_jax.analysis.results import Results


def experiment(preset: str) -> claim.Experiment:
  rule = "sequential D = 2; sampled conditional acceptance"
  return claim.Experiment(
    "hidden_source", preset, "What a sequential module is fed",
    "Acceptance by depth and next-token loss; one dot a seed, mean and 95 % t "
    "interval.",
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
    draw,
  )


def accepted(
  results: Results, depth: int, hidden: str = "chained", fed: str = "true"
) -> pd.Series:
  where = {"mtp.hidden": hidden, "mtp.hidden_norm": "after", "mtp.fed": fed}
  return results.value("sampled_acceptance", sequential(2) | where, depth)


def loss(results: Results, norm: str) -> pd.Series:
  where = {"mtp.hidden_norm": norm, "mtp.fed": "true"}
  return results.value("main_loss", sequential(2) | where, by=["mtp.hidden"])


def draw(results: Results) -> claim.Drawing:
  """Draws acceptance and the main loss by what the module is fed."""
  shown = (
    ("acceptance at depth 1", "sampled_acceptance", 1),
    ("acceptance at depth 2", "sampled_acceptance", 2),
    ("main loss, nats per token", "main_loss", 0),
  )
  keys = [results.key(f"mtp.{key}") for key in ("hidden", "hidden_norm", "fed")]
  figure, axes = drawing.panels(1, len(shown), height=3.8)
  tables = []
  for ax, (title, metric, depth) in zip(axes.flat, shown, strict=True):
    rows = results.measured(metric, sequential(2), depth).dropna(subset="value")
    rows = rows.assign(method=rows[keys].agg(", ".join, axis="columns"))
    dots(ax, rows)
    ax.set_title(title)
    if depth:
      drawing.share_axis(ax)
    tables.append(rows[["trial", "method", "seed", "value"]].assign(shown=title))
  return figure, pd.concat(tables)
