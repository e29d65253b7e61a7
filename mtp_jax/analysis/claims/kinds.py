"""Every kind of predictor on one trunk: claims, and the table of what each costs.

Results of `experiments/kinds.py`: one width, so that differences are formed between
trials of one seed. An arm is known by its config values. NTP's main loss is read from a
frozen trunk, which is NTP's.
"""

import functools
from typing import Any

import pandas as pd

from mtp_jax import interop
from mtp_jax.analysis import drawing, statistics
from mtp_jax.analysis.claims import by_size, claim, siblings
from mtp_jax.analysis.ladders import size_text
from mtp_jax.analysis.results import REPLICATE, Results, Where
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
NAMES = {
  "parallel": "parallel heads", "parallel, Markov": "parallel heads, Markov",
  "linear": "linear heads", "medusa": "Medusa", "medusa, Markov": "Medusa, Markov",
  "eagle": "EAGLE-1", "eagle3": "EAGLE-3", "peagle": "P-EAGLE", "dflash": "DFlash",
  "top": "TOP",
}
# (Name, how it is trained) -> its config values.
ARMS: dict[tuple[str, str], Where] = {
  (name, how): dict(
    zip(_KEYS, (kind, rank, is_shared, how == FROZEN), strict=True)
  )
  for name, (kind, rank, is_shared, hows) in _ARMS.items() for how in hows
}
LABELS = {JOINT: "trained with the trunk", FROZEN: "on a frozen trunk"}
HOW = {
  "drafts drawn": "sample_proposal", "drafts most likely": "argmax_proposal",
  "greedy": "decoded",
}
# On siblings: kinds whose only predictor reads no token after its position, and others.
BLIND = ("parallel", "linear", "medusa", "top")
FED = ("modules", "eagle", "eagle3", "peagle", "dflash")
SIBLING_ARMS: dict[str, Where] = {
  name: {"mtp.kind": _ARMS[name][0], "mtp.markov_rank": _ARMS[name][1]}
  for name in (*BLIND, "parallel, Markov", "medusa, Markov", *FED)
}


def experiment(preset: str) -> claim.Experiment:
  def more(
    key: str, statement: str, first: str, second: str, source: str, side: str = "above"
  ) -> claim.Claim:
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
    "Three depths of equal weight, the data's cross-entropy, equal steps; for sampling "
    "drafts are drawn from the predictors. Mean and 95 % t interval over seeds. On "
    "siblings: one depth, and for all kinds the learning rate of n = 2.",
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
    draw, table=table, beside=f"kinds_{preset}_siblings",
  )


def siblings_experiment(preset: str) -> claim.Experiment:
  at = (
    "1,000 triples; paired gain in held-out next-token loss at the step best on "
    "validation, read on test, averaged over widths"
  )

  def gains(name: str) -> claim.Claim:
    rule = f"{at} with seeds resampled within width (BCa), {name}, above 0"
    return claim.Claim(
      name.replace(", ", "_"), f"Siblings: {name} gains next-token loss", claim.OWN,
      claim.NO_FIGURE, rule, claim.NATS, functools.partial(gains_of, name=name),
    )

  return claim.Experiment(
    "kinds", f"{preset}_siblings", "Every kind on siblings",
    "Gain over NTP in held-out next-token loss with one extra depth of weight 1.",
    (
      claim.Claim(
        "blind_more",
        "Siblings: predictors that read no later token gain more than those that do",
        claim.OWN, claim.NO_FIGURE,
        f"{at} within a seed; mean of {', '.join(BLIND)} minus mean of "
        f"{', '.join(FED)}, t interval over seeds, above 0",
        claim.NATS, blind_gain_more,
      ),
      *map(gains, SIBLING_ARMS),
    ),
  )


def gains_of(results: Results, name: str) -> claim.Finding:
  pairs = siblings.gains(results, "loss", arm=SIBLING_ARMS[name])
  return by_size.average(pairs, f"{name}, gain")


def blind_gain_more(results: Results) -> claim.Finding:
  """Tests the mean gain of BLIND minus the mean gain of FED, within a seed."""
  def mean(names: tuple[str, ...]) -> pd.Series:
    gains = [siblings.gains(results, "loss", arm=SIBLING_ARMS[x]) for x in names]
    return pd.concat(gains).groupby(list(REPLICATE))["gain"].mean()

  return claim.found(mean(BLIND) - mean(FED), "blind minus fed")


def measured(results: Results, metric: str, name: str, how: str) -> pd.Series:
  """Returns a metric of an arm, by seed."""
  return results.value(metric, ARMS[name, how])


def tokens(results: Results, name: str, how: str, by: str) -> pd.Series:
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


def table(results: Results, on_siblings: Results | None = None) -> pd.DataFrame:
  """Returns one row an arm, means over seeds with their 95 % interval.

  parameters: that the deployed model lacks. FLOPs: of training, per token. `opened by`:
  the layouts of Hugging Face folders that hold the predictors.
  """
  gains = sibling_gains(on_siblings)
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
      "gain on siblings": (
        statistics.text(gains[name], "+", 3) if how == JOINT and name in gains else ""
      ),
      "opened by": opened_by(where, int(first["mtp.depth"])),
    })
  return pd.DataFrame(rows)


def sibling_gains(results: Results | None) -> dict[str, dict[str, float]]:
  """Returns the gain on siblings with its interval, by kind; {} without results."""
  if results is None:
    return {}
  found = {name: gains_of(results, name).estimates for name in SIBLING_ARMS}
  return {
    name: {"n": x.n, "mean": x.mean, "low": x.low, "high": x.high}
    for name, estimates in found.items() for x in estimates
  }


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


def draw(results: Results, on_siblings: Results | None = None) -> claim.Drawing:
  """Draws what every kind drafts, costs and gains, a row a kind.

  Filled: trained with the trunk; hollow: after it, on a frozen trunk.
  """
  rows = pd.DataFrame([
    {"kind": name, "trained": how, "shown": shown} | interval(values.dropna())
    for name, how in ARMS if len(results.select(ARMS[name, how]))
    for shown, values in (
      ("tokens", tokens(results, name, how, HOW["drafts drawn"])),
      ("price", price_of(results, name, how)),
    )
    # TOP drafts nothing, and a frozen trunk is NTP's.
    if (name != "top" if shown == "tokens" else how == JOINT)
  ] + [
    {"kind": name, "trained": JOINT, "shown": "gain"} | gain
    for name, gain in sibling_gains(on_siblings).items()
  ])
  best = rows[rows["shown"] == "tokens"].groupby("kind")["mean"].max()
  names = sorted(rows["kind"].unique(), key=lambda x: best.get(x, 0.0))
  titles = {
    "tokens": "tokens per round,\nsampled", "price": "text: loss minus\nNTP's, nats",
    "gain": "siblings: gain\nover NTP, nats",
  }
  titles = {x: title for x, title in titles.items() if x in set(rows["shown"])}
  figure, axes = drawing.panels(
    1, len(titles), height=0.32 * len(names) + 1.4, width=drawing.WIDEST, sharey=True
  )
  for ax, (shown, title) in zip(axes.flat, titles.items(), strict=True):
    for how, label in LABELS.items():
      own = rows[(rows["shown"] == shown) & (rows["trained"] == how)]
      style = drawing.series_style(1, is_hollow=how == FROZEN) | {"linestyle": "none"}
      shift = (0.15 if how == JOINT else -0.15) * (shown == "tokens")
      ax.errorbar(
        own["mean"], [names.index(x) + shift for x in own["kind"]],
        xerr=drawing.error_bars(own).astype(float), capsize=2, label=label, **style,
      )
    ax.set_title(title)
    if shown != "tokens":
      ax.axvline(0.0, color="#777777", linewidth=1)
  axes.flat[0].set_yticks(range(len(names)), [NAMES.get(x, x) for x in names])
  last = axes.flat[-1]
  last.text(1.05, 1.02, "parameters;\nopened as", transform=last.transAxes)
  for place, name in enumerate(names):
    how = JOINT if len(results.select(ARMS[name, JOINT])) else FROZEN
    first = results.select(ARMS[name, how]).iloc[0]
    size = size_text(int(first[results.key("added_parameters")]))
    layouts = opened_by(ARMS[name, how], int(first["mtp.depth"]))
    last.text(
      1.05, place, f"{size}; {layouts}", transform=last.get_yaxis_transform(),
      va="center",
    )
  drawing.legend_below(figure, axes.flat[:1])
  return figure, rows
