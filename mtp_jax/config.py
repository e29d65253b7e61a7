"""A config: typed, immutable sections, made from a ConfigDict or from JSON.

In `sections.py` and `model_sections.py` every key has one line with all its facts; this
module derives from these lines which keys are treated differently.
`config_rules.validate` refuses what cannot work before any work is done. Every error
names the dotted key, the rule and the value.
"""

import dataclasses
import difflib
import functools
import typing
from typing import Any, Literal

from mtp_jax.keys import Conditions, Key, Role
from mtp_jax.model_sections import (
  LatentConfig,
  MoeConfig,
  MtpConfig,
  RopeScalingConfig,
  TrunkConfig,
)
from mtp_jax.sections import (
  MOST_DRAFTS,
  SAT_TABLE_VARIABLES,
  TASKS,
  TASKS_WITH_NEW,
  CheckpointConfig,
  Config,
  CountdownConfig,
  DataConfig,
  EvalConfig,
  InductionConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  PolynomialConfig,
  SatConfig,
  SiblingsConfig,
  StarGraphConfig,
  TaskConfig,
  TokenizerConfig,
  TrainConfig,
)


class ConfigError(ValueError):
  """A config value that breaks a rule; the message has dotted key, rule and value."""


def from_config_dict(values: Any) -> Config:
  """Builds a `Config` from a ConfigDict or plain nested dict.

  Raises:
    ConfigError: unknown key (with the nearest valid one), missing key, wrong type, or
      a value outside a closed set of choices.
  """
  if hasattr(values, "to_dict"):
    values = values.to_dict()
  return _build(Config, values, "")


def from_saved(values: Any) -> Config:
  """Builds the config of a run, which an older version may have saved.

  Keys that are newer than the run have their defaults, with which a run is what it was.

  Raises:
    ConfigError: see `from_config_dict`; a whole section is missing.
  """
  if isinstance(values, dict):
    values = {
      name: _filled(x, defaults()[name]) if name in defaults() else x
      for name, x in values.items()
    }
  return from_config_dict(values)


def _filled(values: Any, default: Any) -> Any:
  """Returns the values of a section, with the defaults of keys that it lacks."""
  if not (isinstance(values, dict) and isinstance(default, dict)):
    return values
  given = {name: _filled(x, default.get(name)) for name, x in values.items()}
  return default | given


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the config as nested plain dicts and lists, ready for JSON."""
  return _plain(dataclasses.asdict(config))


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
  """Returns `config` with dotted keys replaced, checked as `from_config_dict` does."""
  values = to_dict(config)
  for key, value in overrides.items():
    set_dotted(values, key, value)
  return from_config_dict(values)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
  """Sets `values["a"]["b"] = value` for `key = "a.b"`; an unknown key raises."""
  type_name(key)
  *sections, leaf = key.split(".")
  for section in sections:
    values = values[section]
  values[leaf] = value


def get_dotted(config: Any, key: str) -> Any:
  """Returns `config.a.b` for `key = "a.b"`."""
  return functools.reduce(getattr, key.split("."), config)


@functools.cache
def type_name(key: str) -> str:
  """Returns what messages call the type of a dotted key: `int`, `section`, ...

  Raises:
    ConfigError: there is no such key; names the nearest one.
  """
  kind: Any = Config
  for part in key.split("."):
    fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    if part not in fields:
      raise ConfigError(_unknown_key(key))
    kind = fields[part]
  if dataclasses.is_dataclass(kind):
    return "section"
  if typing.get_origin(kind) is tuple:
    return f"sequence of {typing.get_args(kind)[0].__name__}"
  return "str" if typing.get_origin(kind) is Literal else kind.__name__


def dotted_keys(section: Any = Config, prefix: str = "") -> list[str]:
  """Returns every dotted key, sections included."""
  keys = []
  for name, kind in typing.get_type_hints(section).items():
    keys.append(prefix + name)
    if dataclasses.is_dataclass(kind):
      keys += dotted_keys(kind, f"{prefix}{name}.")
  return keys


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns `{"a.b": value}` for nested dicts."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
  """Returns `{dotted key: (value in a, value in b)}` for the keys that differ."""
  left, right = flatten(to_dict(a)), flatten(to_dict(b))
  return {k: (left[k], right[k]) for k in left if left[k] != right[k]}


@functools.cache
def keys() -> dict[str, Key]:
  """Returns the facts in the line of every key, by dotted key.

  A key without conditions of its own has an effect where its section has one.
  """

  def collect(cls: Any, prefix: str, when: Conditions) -> dict[str, Key]:
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
      facts = cls.__dataclass_fields__[name].metadata
      if "key" in facts:
        own = facts["key"]
        own_when = when if own.when is None else own.when
        found[prefix + name] = dataclasses.replace(own, when=own_when)
      else:
        found |= collect(kind, f"{prefix}{name}.", facts.get("when", when))
    return found

  return collect(Config, "", {})


def keys_of(role: Role) -> frozenset[str]:
  """Returns the dotted keys that have this role."""
  return frozenset(name for name, key in keys().items() if role in key.role)


def defaults() -> dict[str, Any]:
  """Returns the default of every key, as nested dicts."""
  values: dict[str, Any] = {}
  for name, key in keys().items():
    *sections, leaf = name.split(".")
    section = values
    for part in sections:
      section = section.setdefault(part, {})
    section[leaf] = key.default
  return values


# What the modules of DeepSeek-V3 start from, by key of `MtpConfig`; no other kind of
# predictor has the choice.
PUBLISHED_INPUTS = {"hidden": "chained", "hidden_norm": "after", "fed": "true"}

# The same with their norms: RMSNorm, as their trunk has.
PUBLISHED_MODULES = PUBLISHED_INPUTS | {"out_norm": "own", "norm": "trunk"}


def next_token_only(mtp: MtpConfig) -> MtpConfig:
  """Returns the section of plain next-token prediction, which all defaults are."""
  names = [field.name for field in dataclasses.fields(mtp)]
  return dataclasses.replace(mtp, **{x: keys()[f"mtp.{x}"].default for x in names})


def learns_from_trunk(mtp: MtpConfig) -> bool:
  """Returns whether the extra depths learn from the trunk, not from data alone."""
  return mtp.objective != "cross_entropy" or mtp.feature_weight > 0


def _build(cls: Any, values: Any, prefix: str) -> Any:
  if not isinstance(values, dict):
    section = prefix.rstrip(".") or "config"
    raise ConfigError(f"{section} must be a section, got {values!r}.")
  fields = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      raise ConfigError(_unknown_key(f"{prefix}{key}"))
  missing = [key for key in fields if key not in values]
  if missing:
    raise ConfigError(f"{prefix}{missing[0]}: missing key.")
  return cls(**{k: _coerce(t, values[k], prefix + k) for k, t in fields.items()})


def _coerce(kind: Any, value: Any, key: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, key + ".")
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if isinstance(value, bool) and "on" in choices:  # As configs had it before `auto`.
      value = "on" if value else "off"
    if value not in choices:
      raise ConfigError(
        f"{key} must be one of {', '.join(map(repr, choices))}, got {value!r}."
      )
    return value
  if typing.get_origin(kind) is tuple:
    (item, _) = typing.get_args(kind)
    if not isinstance(value, (list, tuple)):
      raise ConfigError(f"{key} must be a {type_name(key)}, got {value!r}.")
    return tuple(_coerce(item, v, f"{key}[{i}]") for i, v in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is not kind:
    raise ConfigError(f"{key} must be of type {kind.__name__}, got {value!r}.")
  return value


def _unknown_key(key: str) -> str:
  leaf = key.rpartition(".")[2]

  def likeness(known: str) -> tuple[float, float]:
    """How alike the names are, in any section; and then with their sections."""
    def ratio(a: str, b: str) -> float:
      a, b = a.replace(".", "_"), b.replace(".", "_")
      return difflib.SequenceMatcher(None, a, b).ratio()

    whole = ratio(key, known)
    names = ratio(leaf, known.rpartition(".")[2])
    return max(whole, names, ratio(leaf, known)), whole

  nearest = max(dotted_keys(), key=likeness)
  is_near = likeness(nearest)[0] >= 0.5
  return f"{key}: unknown key" + (f"; did you mean {nearest!r}?" if is_near else ".")


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


