"""Drafters trained after the fact and jointly: their claims' tests, table and figure.

Results of `experiments/drafters.py`. An arm is known by its config values; differences
and ratios are formed between trials of one width and seed, then averaged over the
widths, so that an interval is over seeds.
"""

import functools
from typing import Any

import pandas as pd

from mtp_jax.analysis import statistics
from mtp_jax.analysis.claims import claim
from mtp_jax.analysis.claims.arms import WIDTH
from mtp_jax.analysis.results import REPLICATE, Results, Where, by_key
from mtp_jax.analysis.statistics import interval

_WRITTEN = "data.train_on"
_FROZEN: Where = {"train.freeze_trunk": True}
_JOINT: Where = {"train.freeze_trunk": False}
_MODULE: Where = {"mtp.kind": "sequential", "mtp.share_modules": True}
_MODULES: Where = {"mtp.kind": "sequential", "mtp.share_modules": False}
_OWN: Where = {"mtp.kind": "medusa", "mtp.unembed": "own"}

# Of Medusa on a frozen trunk; how near "as many" is; both were written beforehand.
NEAR = 0.9
# Largest price in nats that counts as none; `parallel` is to cost at least its own.
PRICES = {"modules, joint": 0.02, "medusa, joint": 0.03, "parallel, joint": 0.05}


def _of_module(objective: str) -> Where:
  return _FROZEN | _MODULE | {"mtp.objective": objective}


ARMS: dict[str, Where] = {
  "medusa": _FROZEN | _OWN,
  "medusa, shared matrix": _FROZEN | {"mtp.kind": "medusa", "mtp.unembed": "shared"},
  "eagle": _FROZEN | {"mtp.kind": "eagle"},
  "eagle3": _FROZEN | {"mtp.kind": "eagle3"},
  "modules": _FROZEN | _MODULES,
  "module": _of_module("cross_entropy"),
  "module, KL": _of_module("kl"),
  "module, TV": _of_module("tv"),
  "module, LK": _of_module("log_acceptance"),
  "module, KL, written text": _of_module("kl"),
  "parallel, joint": _JOINT | {"mtp.kind": "parallel"},
  "modules, joint": _JOINT | _MODULES,
  "module, joint": _JOINT | _MODULE,
  "medusa, joint": _JOINT | _OWN,
}
WRITTEN = "module, KL, written text"


def experiment(preset: str) -> claim.Experiment:
  of = "sampled tokens per round of {}, averaged over widths within a seed"
  minus = f"{of.format('the first minus the second')}, {claim.PAIRED}"

  def own(key, statement, rule, margin, test):
    return claim.Claim(key, statement, claim.OWN, "nothing", rule, margin, test)

  def more(
    key: str, statement: str, *arms: str, source: str = claim.OWN,
    published: str = "nothing", by: float = 0.0, side: str = "above",
  ) -> claim.Claim:
    rule = minus if not by else (
      f"{of.format('the first minus the second')}, t interval over seeds, {side} {by:g}"
    )
    return claim.Claim(
      key, statement, source, published, f"{' against '.join(arms)}: {rule}",
      claim.TOKENS,
      functools.partial(brings_more, more=arms[0], less=arms[1], by=by, side=side),
    )

  return claim.Experiment(
    "drafters", preset, "Drafters trained after the fact and jointly",
    "Mean and 95 % t interval over seeds. All draft three tokens a round; those "
    "without 'joint' were trained on the frozen trunk of an NTP run.",
    (
      own(
        "keeps_of_joint", "Modules trained after the fact draft about as well",
        f"{of.format('modules on a frozen trunk over that of joint ones')}, t interval "
        f"over seeds, above {NEAR:g}",
        claim.Margin(0.05, "of the joint ones'"), keeps_of_joint,
      ),
      more(
        "modules_more",
        "Modules, which draw drafts, bring more than Medusa's most likely tokens",
        "modules", "medusa",
      ),
      own(
        "medusa_jointly", "Training Medusa jointly makes no difference to its drafts",
        f"medusa, joint against medusa: {of.format('the first minus the second')}, t "
        "interval over seeds, within the margin",
        claim.TOKENS,
        functools.partial(
          brings_more, more="medusa, joint", less="medusa", side="within"
        ),
      ),
      own(
        "price", "Joint modules and Medusa cost the trunk little, heads more",
        "main loss minus NTP's, averaged over widths within a seed, t intervals over "
        "seeds: "
        + ", ".join(
          f"{'above' if 'parallel' in arm else 'below'} {bound:g} for {arm}"
          for arm, bound in PRICES.items()
        ),
        claim.Margin(0.0, "nats"), price_of_joint,
      ),
      more(
        "eagle3_more", "EAGLE-3 drafts better than EAGLE-1", "eagle3", "eagle",
        source="Li et al. 2025, arXiv 2503.01840", published=claim.NO_FIGURE,
      ),
      more(
        "eagle3_is_module", "EAGLE-3 drafts no better than one module trained on KL",
        "eagle3", "module, KL", by=0.05, side="below",
      ),
      more("kl_more", "KL to the trunk drafts better than cross-entropy", "module, KL",
           "module"),
      more(
        "lk_more", "LK losses draft better than KL", "module, LK", "module, KL",
        source="arXiv 2602.23881",
        published="up to 8 to 10 % more accepted length, 8B to 685B",
      ),
      more(
        "written_more", "Text that the trunk wrote is better to learn from",
        WRITTEN, "module, KL",
      ),
    ),
    table=table,
  )


def measured(
  results: Results, metric: str, arm: str, at_depth: int = 0
) -> pd.Series:
  """Returns the metric of an arm by seed and width."""
  rows = results.measured(metric, ARMS[arm], at_depth)
  # An empty cell is read as NaN: no text but the corpus.
  is_written = rows[results.key(_WRITTEN)].fillna("") != ""
  rows = rows[is_written == (arm == WRITTEN)]
  return by_key(rows, [*REPLICATE, results.key(WIDTH)])


def price(results: Results, arm: str) -> pd.Series:
  """Returns the main loss minus NTP's, which any drafter on its frozen trunk has."""
  return measured(results, "main_loss", arm) - measured(results, "main_loss", "medusa")


def tokens(results: Results, arm: str, how: str = "sampled") -> pd.Series:
  return measured(results, f"{how}_tokens_per_round", arm)


def keeps_of_joint(results: Results) -> claim.Finding:
  ratio = tokens(results, "modules") / tokens(results, "modules, joint")
  return claim.found(ratio, "frozen / joint", threshold=NEAR, sign="")


def brings_more(
  results: Results, more: str, less: str, by: float = 0.0, side: str = "above"
) -> claim.Finding:
  difference = tokens(results, more) - tokens(results, less)
  return claim.found(difference, f"{more} minus {less}", threshold=by, side=side)


def price_of_joint(results: Results) -> claim.Finding:
  return claim.Finding(tuple(
    claim.over_seeds(
      price(results, arm), arm, threshold=bound,
      side="above" if arm.startswith("parallel") else "below",
    )
    for arm, bound in PRICES.items()
  ))


def _by_width(values: pd.Series) -> dict[int, dict[str, float]]:
  """Returns {width: interval over seeds}."""
  own = values.dropna()
  return {width: interval(x) for width, x in own.groupby(level=WIDTH)}


def table(results: Results) -> pd.DataFrame:
  """Returns the comparison: one row an arm and width, means over seeds.

  parameters: of the drafter. FLOPs: of its training, per token. Tokens per round with
  their 95 % t interval over seeds; alpha, conditional, and S, survival, by draft.
  """
  rows = []
  nothing = interval([])
  for arm, where in ARMS.items():
    greedy = _by_width(tokens(results, arm, "decoded"))
    loss = _by_width(price(results, arm))
    drafts = {
      f"{symbol}_{depth}": _by_width(measured(results, f"sampled_{metric}", arm, depth))
      for symbol, metric in (("alpha", "acceptance"), ("S", "survival"))
      for depth in (1, 2, 3)
    }
    for width, sampled in _by_width(tokens(results, arm)).items():
      trials = results.select(where | {WIDTH: width})
      rows.append({
        "drafter": arm, "width": width, "seeds": sampled["n"],
        "parameters": int(trials[results.key("added_parameters")].iloc[0]),
        "MFLOPs per token": trials[results.key("flops_per_token")].iloc[0] / 1e6,
        "tokens per round, sampled": _bracketed(sampled),
        "greedy": _bracketed(greedy.get(width, nothing)),
        **{name: own.get(width, nothing)["mean"] for name, own in drafts.items()},
        "main loss minus NTP's": _bracketed(loss.get(width, nothing), "+"),
      })
  return pd.DataFrame(rows)


def _bracketed(over: dict[str, Any], sign: str = "") -> str:
  return statistics.text(over, sign, 3) if over["n"] else ""
