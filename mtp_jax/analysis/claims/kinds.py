"""Every kind of predictor on one trunk: claims, and the table of what each costs.

Results of `experiments/kinds.py`: one width, so that differences are formed between
trials of one seed. An arm is known by its config values. NTP's main loss is read from a
frozen trunk, which is NTP's.
"""

import functools
from typing import Any

import pandas as pd

from mtp_jax import interop
from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.results import Results, Where
from mtp_jax.analysis.statistics import interval
from mtp_jax.config import defaults, from_config_dict, with_overrides

_KEYS = ("mtp.kind", "mtp.markov_rank", "mtp.share_modules", "train.freeze_trunk")
_RANK = 256
FROZEN, JOINT = "frozen", "joint"
# Kind, rank of a Markov head, one module for all depths, and how it is trained.
_ARMS = {
  "parallel": ("parallel", 0, False, (JOINT,)),
  "parallel, Markov": ("parallel", _RANK, False, (JOINT,)),
  "linear": ("linear", 0, False, (FROZEN, JOINT)),
  "medusa": ("medusa", 0, False, (FROZEN, JOINT)),
  "medusa, Markov": ("medusa", _RANK, False, (FROZEN, JOINT)),
  "modules": ("sequential", 0, False, (FROZEN, JOINT)),
  "one module": ("sequential", 0, True, (FROZEN, JOINT)),
  "eagle": ("eagle", 0, False, (FROZEN, JOINT)),
  "eagle3": ("eagle3", 0, False, (FROZEN, JOINT)),
  "peagle": ("peagle", 0, False, (FROZEN, JOINT)),
  "dflash": ("dflash", 0, False, (FROZEN, JOINT)),
  "top": ("top", 0, False, (JOINT,)),
}
# (Name, how it is trained) -> its config values.
ARMS: dict[tuple[str, str], Where] = {
  (name, how): dict(
    zip(_KEYS, (kind, rank, is_shared, how == FROZEN), strict=True)
  )
  for name, (kind, rank, is_shared, hows) in _ARMS.items() for how in hows
}
HOW = {
  "sampled": "sampled", "drafts drawn": "sample_proposal",
  "drafts most likely": "argmax_proposal", "greedy": "decoded",
}


def experiment(preset: str) -> claim.Experiment:
  def more(
    key: str, statement: str, first: str, second: str, source: str, side: str = "above"
  ) -> claim.Claim:
    # At one proposal: `sampled` draws drafts that depend on each other, and takes the
    # most likely tokens of others.
    rule = (
      "sampled tokens per round with drawn drafts, on a frozen trunk, "
      f"{first} minus {second}, paired by seed, t interval over seeds, {side} 0"
    )
    return claim.Claim(
      key, statement, source, claim.NO_FIGURE, rule, claim.TOKENS,
      functools.partial(brings_more, more=first, less=second, side=side),
    )

  def price(key: str, statement: str, name: str, source: str) -> claim.Claim:
    rule = f"main loss, {name} joint minus NTP, {claim.PAIRED}"
    return claim.Claim(
      key, statement, source, claim.NO_FIGURE, rule, claim.NATS,
      functools.partial(costs, name=name),
    )

  return claim.Experiment(
    "kinds", preset, "Every kind of predictor on one trunk",
    "Three depths of equal weight, the data's cross-entropy, equal steps. Mean and "
    "95 % t interval over seeds.",
    (
      more(
        "passes_matter", "Drafts in one pass bring fewer tokens than drafts in turn",
        "peagle", "eagle3", "P-EAGLE, arXiv 2602.01469", "below",
      ),
      more(
        "block_more", "A block that sees itself drafts better than masks that do not",
        "dflash", "peagle", "DFlash, arXiv 2602.06036",
      ),
      more(
        "markov_more", "A Markov head improves Medusa heads on a frozen trunk",
        "medusa, Markov", "medusa", "DSpark, arXiv 2607.05147",
      ),
      price(
        "block_costs", "DFlash that learns with its trunk costs main loss", "dflash",
        claim.OWN,
      ),
      price("top_costs", "TOP costs main loss at this size", "top", claim.TOP),
    ),
    table=table,
  )


def measured(results: Results, metric: str, name: str, how: str) -> pd.Series:
  """Returns a metric of an arm, by seed."""
  return results.value(metric, ARMS[name, how])


def tokens(results: Results, name: str, how: str, by: str = "sampled") -> pd.Series:
  return measured(results, f"{by}_tokens_per_round", name, how)


def price_of(results: Results, name: str, how: str) -> pd.Series:
  """Returns the main loss minus NTP's."""
  ntp = measured(results, "main_loss", "eagle3", FROZEN)
  return measured(results, "main_loss", name, how) - ntp


def brings_more(results: Results, more: str, less: str, side: str) -> claim.Finding:
  drawn = HOW["drafts drawn"]
  difference = tokens(results, more, FROZEN, drawn) - tokens(
    results, less, FROZEN, drawn
  )
  return claim.found(difference, f"{more} minus {less}", side=side)


def costs(results: Results, name: str) -> claim.Finding:
  return claim.found(price_of(results, name, JOINT), f"{name} minus NTP")


def table(results: Results) -> pd.DataFrame:
  """Returns one row an arm, means over seeds with their 95 % t interval.

  parameters: that the deployed model lacks. FLOPs: of training, per token. `opened by`:
  the layouts of Hugging Face folders that hold the predictors.
  """
  rows = []
  for (name, how), where in ARMS.items():
    trials = results.select(where)
    if trials.empty:
      continue
    first = trials.iloc[0]
    rows.append({
      "kind": name, "trained": how, "seeds": len(trials),
      "parameters": int(first[results.key("added_parameters")]),
      "MFLOPs per token": first[results.key("flops_per_token")] / 1e6,
      "main loss minus NTP's": _bracketed(price_of(results, name, how), "+"),
      **{
        f"tokens per round, {words}": _bracketed(tokens(results, name, how, by))
        for words, by in HOW.items()
      },
      "opened by": opened_by(where, int(first["mtp.depth"])),
    })
  return pd.DataFrame(rows)


def opened_by(where: Where, depth: int) -> str:
  """Returns the layouts that hold an arm's predictors on a Llama trunk."""
  config = with_overrides(
    from_config_dict(defaults()), where | {"mtp.depth": depth}
  )
  layouts = [x for x, why in interop.layouts_for(config).items() if not why]
  return ", ".join(layouts) or "mtp-jax alone"


def _bracketed(values: pd.Series, sign: str = "") -> str:
  over: dict[str, Any] = interval(values.dropna())
  return statistics.text(over, sign, 3) if over["n"] else ""
