"""Drafters trained after the fact and jointly: their claims' tests, table and figure.

Results of `experiments/drafters.py`. An arm is told by its config values; differences
and ratios are formed between trials of one width and seed, then averaged over the
widths, so that an interval is over seeds.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pandas as pd

from mtp_jax.analysis.claims.arms import WIDTH, Where
from mtp_jax.analysis.claims.claim import (
  NO_FIGURE,
  OWN,
  PAIRED,
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
  TOKENS,
  Finding,
  Margin,
  by_key,
  mean_over_seeds,
)
from mtp_jax.analysis.statistics import interval

_WRITTEN = "data.train_on"
_FROZEN: Where = {"train.freeze_trunk": True}
_JOINT: Where = {"train.freeze_trunk": False}
_MODULE: Where = {"mtp.kind": "sequential", "mtp.share_modules": True}
_MODULES: Where = {"mtp.kind": "sequential", "mtp.share_modules": False}
_OWN: Where = {"mtp.kind": "medusa", "mtp.unembed": "own"}

# Of Medusa on a frozen trunk; how near "as many" is; both were written beforehand.
FEW_TOKENS = 1.5
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


def experiment(preset: str) -> Experiment:
  of = "sampled tokens per round of {}, averaged over widths within a seed"
  minus = f"{of.format('the first minus the second')}, {PAIRED}"

  def own(key, statement, rule, margin, test):
    return Claim(key, statement, OWN, "nothing", rule, margin, test)

  def more(
    key: str, statement: str, *arms: str, source: str = OWN, published: str = "nothing",
    by: float = 0.0, side: str = "above",
  ) -> Claim:
    rule = minus if not by else (
      f"{of.format('the first minus the second')}, t interval over seeds, {side} {by:g}"
    )
    return Claim(
      key, statement, source, published, f"{' against '.join(arms)}: {rule}", TOKENS,
      functools.partial(
        brings_more, more=arms[0], less=arms[1], by=by, side=side
      ),
    )

  return Experiment(
    "drafters", preset, "Drafters trained after the fact and jointly",
    "Mean and 95 % t interval over seeds. All draft three tokens a round; those "
    "without 'joint' were trained on the frozen trunk of an NTP run.",
    (
      own(
        "keeps_of_joint", "Modules trained after the fact draft about as well",
        f"{of.format('modules on a frozen trunk over that of joint ones')}, t interval "
        f"over seeds, above {NEAR:g}",
        Margin(0.05, "of the joint ones'"), keeps_of_joint,
      ),
      own(
        "medusa_few", f"Medusa brings at most {FEW_TOKENS:g} tokens a round",
        f"{of.format('Medusa on a frozen trunk')}, t interval over seeds, below "
        f"{FEW_TOKENS:g}",
        # The threshold is the margin: a bound is met or not.
        Margin(0.0, "tokens per round"), medusa_brings_little,
      ),
      more("modules_more", "Modules draft better than Medusa", "modules", "medusa"),
      own(
        "medusa_jointly", "Training Medusa jointly makes no difference to its drafts",
        f"medusa, joint against medusa: {of.format('the first minus the second')}, t "
        "interval over seeds, within the margin",
        TOKENS,
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
        Margin(0.0, "nats"), price_of_joint,
      ),
      more(
        "eagle3_more", "EAGLE-3 drafts better than EAGLE-1", "eagle3", "eagle",
        source="Li et al. 2025, arXiv 2503.01840", published=NO_FIGURE,
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
    draw, table=table,
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


def ntp_loss(results: Results) -> pd.Series:
  """Returns the main loss of NTP: that of any drafter on its frozen trunk."""
  return measured(results, "main_loss", "medusa")


def per_seed(values: pd.Series) -> pd.Series:
  """Returns the mean over widths of every seed; NaN where a width is missing."""
  return values.unstack(WIDTH).mean(axis="columns", skipna=False)


def tokens(results: Results, arm: str, how: str = "sampled") -> pd.Series:
  return measured(results, f"{how}_tokens_per_round", arm)


def keeps_of_joint(results: Results) -> Finding:
  """Tests whether modules on a frozen trunk keep `NEAR` of the tokens of joint ones."""
  ratio = tokens(results, "modules") / tokens(results, "modules, joint")
  return Finding((
    mean_over_seeds(per_seed(ratio), "frozen / joint", NEAR, sign=""),
  ))


def medusa_brings_little(results: Results) -> Finding:
  """Tests whether Medusa on a frozen trunk stays below `FEW_TOKENS` a round."""
  own = per_seed(tokens(results, "medusa"))
  return Finding((mean_over_seeds(own, "tokens per round", FEW_TOKENS, "below", ""),))


def brings_more(
  results: Results, more: str, less: str, by: float = 0.0, side: str = "above"
) -> Finding:
  """Tests the difference in sampled tokens per round of two arms against `by`."""
  difference = tokens(results, more) - tokens(results, less)
  return Finding((
    mean_over_seeds(per_seed(difference), f"{more} minus {less}", by, side),
  ))


def price_of_joint(results: Results) -> Finding:
  """Tests the main loss of joint training against NTP's, each arm against its bound."""
  plain = ntp_loss(results)
  return Finding(tuple(
    mean_over_seeds(
      per_seed(measured(results, "main_loss", arm) - plain), arm, bound,
      "above" if arm.startswith("parallel") else "below",
    )
    for arm, bound in PRICES.items()
  ))


def table(results: Results) -> pd.DataFrame:
  """Returns the comparison: one row an arm and width, means over seeds.

  parameters: of the drafter. FLOPs: of its training, per token. Tokens per round with
  their 95 % t interval over seeds; alpha, conditional, and S, survival, by draft.
  """
  rows = []
  for arm, width in _arms_and_widths(results):
    def over(metric: str, depth: int = 0, arm=arm, width=width) -> dict[str, Any]:
      own = measured(results, metric, arm, depth).unstack(WIDTH)[width]
      return interval(own.dropna().to_numpy())

    trials = results.select(ARMS[arm] | {WIDTH: width})
    loss = measured(results, "main_loss", arm) - ntp_loss(results)
    sampled, greedy = (over(f"{x}_tokens_per_round") for x in ("sampled", "decoded"))
    row = {
      "drafter": arm, "width": width, "seeds": sampled["n"],
      "parameters": int(trials[results.key("added_parameters")].iloc[0]),
      "MFLOPs per token": trials[results.key("flops_per_token")].iloc[0] / 1e6,
      "tokens per round, sampled": _bracketed(sampled),
      "greedy": _bracketed(greedy),
    }
    for symbol, metric in (("alpha", "acceptance"), ("S", "survival")):
      for depth in (1, 2, 3):
        row[f"{symbol}_{depth}"] = over(f"sampled_{metric}", depth)["mean"]
    own = interval(loss.unstack(WIDTH)[width].dropna().to_numpy())
    rows.append(row | {"main loss minus NTP's": _bracketed(own, "+")})
  return pd.DataFrame(rows)


def draw(results: Results) -> Drawing:
  """Draws sampled tokens per round and the price in main loss, one line an arm."""
  shown = {
    "sampled tokens per round": lambda arm: tokens(results, arm),
    "main loss minus NTP's, nats": lambda arm: (
      measured(results, "main_loss", arm) - ntp_loss(results)
    ),
  }
  arms = list(dict.fromkeys(arm for arm, _ in _arms_and_widths(results)))
  widths = sorted({width for _, width in _arms_and_widths(results)})
  figure, axes = panels(1, 2, width=9.0, height=0.3 * len(arms) + 1.3, sharey=True)
  numbers = []
  for ax, (title, values) in zip(axes.flat, shown.items(), strict=True):
    for place, arm in enumerate(arms):
      by_width = values(arm).unstack(WIDTH)
      for index, width in enumerate(widths):
        if width not in by_width:
          continue
        over = pd.DataFrame([interval(by_width[width].dropna().to_numpy())])
        aside = 0.34 * (index - (len(widths) - 1) / 2)
        ax.errorbar(
          over["mean"], place + aside, xerr=error_bars(over), capsize=2,
          color=COLOURS[ARMS[arm]["mtp.kind"]], marker=series_marker(index),
          markerfacecolor="white" if index % 2 else COLOURS[ARMS[arm]["mtp.kind"]],
          linestyle="none", label=f"width {width}" if place == 0 else None,
        )
        numbers.append({"shown": title, "drafter": arm, "width": width})
        numbers[-1] |= over.iloc[0].to_dict()
    ax.set_xlabel(title)
  axes[0, 0].set_yticks(range(len(arms)), arms)
  axes[0, 0].invert_yaxis()
  zero_line(axes[0, 1], "x")
  legend_below(figure, axes.flat)
  return figure, pd.DataFrame(numbers)


def _arms_and_widths(results: Results) -> Iterator[tuple[str, int]]:
  """Yields the arms, and their widths, that were measured."""
  for arm in ARMS:
    own = tokens(results, arm).dropna()
    for width in sorted(own.index.get_level_values(WIDTH).unique()):
      yield arm, width


def _bracketed(over: dict[str, Any], sign: str = "") -> str:
  if not over["n"]:
    return ""
  if over["n"] == 1:
    return f"{over['mean']:{sign}.3f}"
  return "{mean:{s}.3f} [{low:{s}.3f}, {high:{s}.3f}]".format(s=sign, **over)
