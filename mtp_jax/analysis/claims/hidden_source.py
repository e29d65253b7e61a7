"""What a sequential module is fed: its hidden state, the norm, the embedding."""

import pandas as pd

from mtp_jax.analysis.claims.acceptance import rows_at
from mtp_jax.analysis.claims.arms import Where, sequential
from mtp_jax.analysis.claims.claim import OWN, PAIRED, Claim, Drawing, Experiment
from mtp_jax.analysis.claims.pictures import dots
from mtp_jax.analysis.drawing import panels, share_axis
from mtp_jax.analysis.results import Results
from mtp_jax.analysis.rules import NATS, POINTS, Finding, mean_over_seeds, paired


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


def arm(hidden: str = "chained", norm: str = "after", fed: str = "true") -> Where:
  return sequential(2) | {
    "mtp.hidden": hidden, "mtp.hidden_norm": norm, "mtp.fed": fed,
  }


def chained_accepts_more(results: Results) -> Finding:
  """Tests whether a chained state drafts the second token better than the trunk's."""
  difference = paired(*(rows_at(results, arm(x), 2) for x in ("chained", "trunk")))
  return Finding((mean_over_seeds(difference, "chained minus trunk"),))


def embedding_helps(results: Results) -> Finding:
  """Tests whether the first draft is worse without the embedding of its token."""
  difference = paired(*(rows_at(results, arm(fed=x), 1) for x in ("true", "none")))
  return Finding((mean_over_seeds(difference, "with minus without"),))


def norm_does_not_matter(results: Results) -> Finding:
  """Tests whether the main loss is the same with the state from before the norm."""
  before, after = (
    pd.concat([
      results.measured("main_loss", arm(hidden, norm))
      for hidden in ("chained", "trunk")
    ])
    for norm in ("before", "after")
  )
  difference = paired(before, after, ("mtp.hidden",))
  return Finding((mean_over_seeds(difference, "before minus after", side="within"),))


def draw(results: Results) -> Drawing:
  """Acceptance at depths 1 and 2 and the main loss, by what the module is fed."""
  shown = (
    ("acceptance at depth 1", "sampled_acceptance", 1),
    ("acceptance at depth 2", "sampled_acceptance", 2),
    ("main loss, nats per token", "main_loss", 0),
  )
  keys = [results.key(f"mtp.{key}") for key in ("hidden", "hidden_norm", "fed")]
  figure, axes = panels(1, len(shown), height=3.8)
  tables = []
  for ax, (title, metric, depth) in zip(axes.flat, shown, strict=True):
    rows = results.measured(metric, sequential(2), depth).dropna(subset="value")
    rows = rows.assign(method=rows[keys].agg(", ".join, axis="columns"))
    dots(ax, rows)
    ax.set_title(title)
    if depth:
      share_axis(ax)
    tables.append(rows[["trial", "method", "seed", "value"]].assign(shown=title))
  return figure, pd.concat(tables)
