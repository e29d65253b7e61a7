"""What a sequential module is fed: its hidden state, the norm, the embedding."""

import pandas as pd

from mtp_jax.analysis import drawing
from mtp_jax.analysis.claims.arms import sequential
from mtp_jax.analysis.claims.claim import (
  NATS,
  OWN,
  PAIRED,
  POINTS,
  Claim,
  Drawing,
  Experiment,
  Finding,
  found,
)
from mtp_jax.analysis.claims.pictures import dots
from mtp_jax.analysis.results import Results, Where


def experiment(preset: str) -> Experiment:
  rule = "sequential D = 2; sampled conditional acceptance"
  return Experiment(
    "hidden_source", preset, "What a sequential module is fed",
    "Acceptance by depth and next-token loss; one dot a seed, mean and 95 % t "
    "interval.",
    (
      Claim(
        "chained_more", "A chained state drafts the second token better", OWN,
        "nothing", f"{rule} at depth 2, chained minus trunk, {PAIRED}", POINTS,
        chained_accepts_more,
      ),
      Claim(
        "embedding_helps", "Without the embedding the first draft is worse", OWN,
        "nothing", f"{rule} at depth 1, fed true minus fed none, {PAIRED}", POINTS,
        embedding_helps,
      ),
      Claim(
        "norm_is_neutral", "The norm before or after makes no difference to the loss",
        OWN, "nothing",
        "main loss, hidden_norm before minus after, averaged over chained and trunk "
        "within a seed, t interval over seeds, within the margin",
        NATS, norm_does_not_matter,
      ),
    ),
    draw,
  )


def arm(norm: str = "after", fed: str = "true", **hidden: str) -> Where:
  return sequential(2) | {"mtp.hidden_norm": norm, "mtp.fed": fed} | {
    f"mtp.{key}": value for key, value in hidden.items()
  }


def chained_accepts_more(results: Results) -> Finding:
  chained, trunk = (
    results.value("sampled_acceptance", arm(hidden=hidden), 2)
    for hidden in ("chained", "trunk")
  )
  return found(chained - trunk, "chained minus trunk")


def embedding_helps(results: Results) -> Finding:
  true, none = (
    results.value("sampled_acceptance", arm(fed=fed, hidden="chained"), 1)
    for fed in ("true", "none")
  )
  return found(true - none, "with minus without")


def norm_does_not_matter(results: Results) -> Finding:
  before, after = (
    results.value("main_loss", arm(norm), by=["mtp.hidden"])
    for norm in ("before", "after")
  )
  return found(before - after, "before minus after", side="within")


def draw(results: Results) -> Drawing:
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
