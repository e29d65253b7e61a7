"""Which trials may be compared: ladders, methods and the learning rate that is used.

Trials are grouped by what varies between them, never by their names.

- The *size* of a trial is the number of parameters of the plain next-token model with
  its trunk settings, whatever predictors or shortening the trial itself has.
- A *ladder* holds trials with the same text, tokenizer, evaluation, optimizer kind and
  so on. Values that usually follow the model size (`MAY_SCALE`) may differ between its
  sizes; one that varies within a size makes separate ladders of its values.
- A *method* is the mtp section with the values that have no effect left out. NTP is
  plain next-token prediction; arm `flops` is NTP too, trained for longer.
- Of the learning rates and weight decays (`TUNED`) that a method was trained with at a
  size, the setting with the most seeds is *chosen*, the lowest mean loss among equals;
  the others are checks.
"""

import collections
import dataclasses
from typing import Any

import pandas as pd

from mtp_jax.analysis.runs import Runs
from mtp_jax.config import (
  Config,
  MtpConfig,
  flatten,
  keys_of,
  to_dict,
)
from mtp_jax.effects import idle_keys
from mtp_jax.keys import Role
from mtp_jax.predictors import KINDS, kind_of

NTP = "NTP"

# How a program runs, not what it computes.
IGNORED = keys_of(Role.UNCOMPARED)
# What tells trials of one cell apart.
WITHIN = keys_of(Role.REPEATS)
# What a ladder may change from size to size.
MAY_SCALE = keys_of(Role.SCALES)
# What is tuned for every size and method.
TUNED = ("optimizer.learning_rate", "optimizer.weight_decay")


def arrange(runs: Runs) -> pd.DataFrame:
  """Returns the trials with columns ladder, method, kind, depth, arm, chosen, copy.

  `ladder` is '' if there is only one, else the values that tell it from the others.
  `copy` names the trial that this one repeats (same config but for its name); copies
  count once. Rows are ordered by ladder, method and size.
  """
  trials = runs.trials.copy()
  methods = [canonical(config) for config in trials["config"]]
  texts = [config.data.source for config in trials["config"]]
  # A name has what tells it from the other methods on the same text or task.
  of_text = collections.defaultdict(list)
  for text, method in zip(texts, methods, strict=True):
    of_text[text].append(method)
  names = {text: method_labels(own) for text, own in of_text.items()}
  trials["mtp"] = methods
  trials["method"] = [names[x][m] for x, m in zip(texts, methods, strict=True)]
  trials["kind"] = ["none" if m.arm == "flops" else m.kind for m in methods]
  trials["depth"] = [0 if m.arm == "flops" else m.depth for m in methods]
  trials["arm"] = [m.arm for m in methods]
  trials["ladder"] = _ladder_labels(list(trials["config"]), list(trials["size"]))
  trials["weight_decay"] = [x.optimizer.weight_decay for x in trials["config"]]
  order = {m: i for i, m in enumerate(sorted(set(methods), key=_order))}
  trials["order"] = [order[m] for m in methods]
  tuned = ["learning_rate", "weight_decay"]
  trials = trials.sort_values(
    ["ladder", "order", "size", *tuned, "seed", "data_seed", "trial"]
  ).reset_index(drop=True)
  same = ["ladder", "method", "size", *tuned, "seed", "data_seed"]
  first = trials.groupby(same)["trial"].transform(_first_finished(trials))
  trials["copy"] = first.where(first != trials["trial"], "")
  trials["chosen"] = _chosen(trials, runs.metrics)
  return trials


def canonical(config: Config) -> MtpConfig:
  """Returns the mtp section with every value that has no effect set to a fixed one."""
  idle = {
    key.removeprefix("mtp."): 0.0 if isinstance(default, float) else default
    for key, default in idle_keys(config).items()
    if key.startswith("mtp.")
  }
  mtp = dataclasses.replace(config.mtp, **idle)
  if mtp.depth == 0:
    # Without a depth a kind is NTP, but for one whose block is part of the model.
    kind = mtp.kind if kind_of(mtp).deployed_blocks else "none"
    return dataclasses.replace(mtp, kind=kind, arm="added")
  # Kind, depth and own tokens say how long NTP is trained, other tokens do not.
  if mtp.arm == "flops" and mtp.fed == "none":
    return dataclasses.replace(mtp, fed="true")
  return mtp


def method_labels(methods: list[MtpConfig]) -> dict[MtpConfig, str]:
  """Returns a name for each canonical method: kind, D, and what else tells it apart.

  "What else" are the values that vary among the methods of the same kind.
  """
  labels = {}
  for kind in KINDS:
    own = [m for m in methods if m.kind == kind and m.depth and m.arm != "flops"]
    varying = _varying([_details(m) for m in own])
    for mtp in own:
      details = {k: v for k, v in _details(mtp).items() if k in varying}
      labels[mtp] = " ".join([f"{kind} D={mtp.depth}", *_phrases(details)])
  for mtp in methods:
    if mtp.arm == "flops":
      shared = " shared" if mtp.share_modules else ""
      own = " fed=own" if mtp.fed == "own" else ""
      labels[mtp] = f"NTP at FLOPs of {mtp.kind} D={mtp.depth}{shared}{own}"
    elif mtp.depth == 0:
      labels[mtp] = f"{mtp.kind} D=0" if kind_of(mtp).deployed_blocks else NTP
  return labels


def settings_that_scale(trials: pd.DataFrame) -> pd.DataFrame:
  """Returns one row a size with the config values that differ between the sizes."""
  recipes = {
    size: _recipe(cell["config"].iloc[0]) for size, cell in trials.groupby("size")
  }
  varying = _varying(list(recipes.values()))
  rows = [
    {"size": size} | {k: v for k, v in recipe.items() if k in varying}
    for size, recipe in recipes.items()
  ]
  return pd.DataFrame(rows)


def size_text(parameters: float) -> str:
  """Returns 950, 12k, 3.1M or 13B."""
  for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if parameters >= 0.9995 * limit:  # What rounds up to the unit.
      return f"{parameters / limit:.3g}{unit}"
  return f"{parameters:.0f}"


def _details(mtp: MtpConfig) -> dict[str, Any]:
  fields = dataclasses.asdict(mtp)
  return {k: v for k, v in fields.items() if k not in ("kind", "depth")}


def _phrases(details: dict[str, Any]) -> list[str]:
  signs = {"weight": "λ=", "arm": "", "weighting": ""}
  phrases = []
  for key, value in details.items():
    if key == "share_modules":
      phrases.append("shared" if value else "own modules")
    elif isinstance(value, float):
      phrases.append(f"{signs.get(key, key + '=')}{value:g}")
    else:
      phrases.append(f"{signs.get(key, key + '=')}{value}")
  return phrases


def _order(mtp: MtpConfig) -> tuple:
  is_longer_ntp = mtp.arm == "flops"
  return (
    mtp.depth > 0,
    not is_longer_ntp,
    list(KINDS).index(mtp.kind),
    mtp.depth,
    str(dataclasses.astuple(mtp)),
  )


def _recipe(config: Config) -> dict[str, Any]:
  flat = flatten(to_dict(config))
  dropped = {*IGNORED, *WITHIN, *TUNED}
  # Whether there is such a run is a setting; which one follows the seed.
  for key in ("train.trunk_from", "train.start_from"):
    flat[key] = bool(flat[key])
  return {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in flat.items()
    if k not in dropped and not k.startswith("mtp.")
  }


def _ladder_labels(configs: list[Config], sizes: list[int]) -> list[str]:
  recipes = [_recipe(config) for config in configs]
  fixed = [
    tuple((k, v) for k, v in recipe.items() if k not in MAY_SCALE)
    for recipe in recipes
  ]
  cells = collections.defaultdict(list)
  for recipe, key, size in zip(recipes, fixed, sizes, strict=True):
    cells[key, size].append(recipe)
  splitting = collections.defaultdict(set)
  for (key, _), members in cells.items():
    splitting[key] |= _varying(members)
  keys = [
    dict(key) | {k: v for k, v in recipe.items() if k in splitting[key]}
    for recipe, key in zip(recipes, fixed, strict=True)
  ]
  every = {k for key in keys for k in key}
  full = [{k: key.get(k, "follows size") for k in every} for key in keys]
  source = "data.source"
  # Texts and tasks differ in many keys. A label has the source and the keys that vary
  # among the ladders of this source.
  varying = {
    x: _varying([key for key in full if key[source] == x])
    for x in {key[source] for key in full}
  }
  several = {source} if len(varying) > 1 else set()
  return [
    ", ".join(
      f"{k}={key[k]}" for k in sorted((varying[key[source]] | several) & key.keys())
    )
    for key in keys
  ]


def sources(trials: pd.DataFrame) -> dict[str, str]:
  """Returns {ladder: its text or task}."""
  first = trials.drop_duplicates("ladder")
  return {
    label: config.data.source
    for label, config in zip(first["ladder"], first["config"], strict=True)
  }


def _varying(dicts: list[dict[str, Any]]) -> set[str]:
  """The keys that do not have one value throughout."""
  if not dicts:
    return set()
  return {k for k in dicts[0] if any(d[k] != dicts[0][k] for d in dicts)}


def _first_finished(trials: pd.DataFrame) -> Any:
  finished = set(trials.loc[trials["status"] == "finished", "trial"])
  return lambda names: next((n for n in names if n in finished), names.iloc[0])


def _chosen(trials: pd.DataFrame, metrics: pd.DataFrame) -> pd.Series:
  """Marks the finished trials, copies left out, at their cell's chosen setting."""
  losses = metrics[metrics["metric"] == "main_loss"].set_index("trial")["mean"]
  usable = (trials["status"] == "finished") & (trials["copy"] == "")
  chosen = pd.Series(False, index=trials.index)
  for _, cell in trials[usable].groupby(["ladder", "method", "size"]):
    # A loss that is not finite is the worst there is.
    loss = cell["trial"].map(losses).fillna(float("inf"))
    tuned = list(zip(cell["learning_rate"], cell["weight_decay"], strict=True))
    setting = pd.Series(tuned, index=cell.index)
    by_setting = loss.groupby(setting)
    rank = pd.DataFrame({"seeds": -by_setting.size(), "loss": by_setting.mean()})
    best = rank.sort_values(["seeds", "loss"]).index[0]
    chosen[cell.index] = [x == best for x in setting]
  return chosen
