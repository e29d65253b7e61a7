"""Where config keys have an effect, and configs without the keys that have none."""

import dataclasses
import functools
from typing import Any

from mtp_jax.config import Config, flatten, keys, to_dict, with_overrides
from mtp_jax.keys import Conditions, Range
from mtp_jax.predictors import reading


def conditions(name: str) -> Conditions:
  """Returns where a key has an effect: by its line, and for the kinds that read it."""
  section, _, leaf = name.rpartition(".")
  kinds = reading(leaf) if section == "mtp" else ()
  return ({"mtp.kind": kinds} if kinds else {}) | keys()[name].when


def has_effect(wanted: Conditions, values: dict[str, Any]) -> bool:
  """Whether all conditions hold: the keys have these values, and an effect themselves.

  `values`: of all dotted keys.
  """

  def holds(name: str, allowed: tuple | Range) -> bool:
    is_allowed = allowed.holds if isinstance(allowed, Range) else allowed.__contains__
    return is_allowed(values[name]) and has_effect(conditions(name), values)

  return all(
    any(holds(name, allowed) for name in ([names] if isinstance(names, str) else names))
    for names, allowed in wanted.items()
  )


def idle_keys(config: Config) -> dict[str, Any]:
  """Returns the default of every key that has no effect under the other values."""
  values, idle = flatten(to_dict(config)), {}
  # What has no effect may be all that another key had an effect by.
  while more := {
    name: key.default
    for name, key in keys().items()
    if name not in idle
    and not has_effect(conditions(name) | key.then | key.when_given, values)
  }:
    idle |= more
    values |= more
  return idle


@functools.lru_cache(maxsize=4096)
def settled(config: Config) -> Config:
  """Returns the config with the default for every key that has no effect."""
  return with_overrides(config, idle_keys(config))


def essential(config: Config) -> Config:
  """Returns the config with one value for all that decides nothing about a run.

  Runs of equal ones have the same bits.
  """
  return dataclasses.replace(settled(config), name="")
