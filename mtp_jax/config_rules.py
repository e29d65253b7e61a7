"""Which configs can work: every rule that involves more than one value's type.

A message has the dotted key, the rule and the value.
"""

import dataclasses
import functools
import importlib.util
import math
import typing
from collections.abc import Collection
from typing import Any

import jax

from experiments import base
from mtp_jax.config import (
  MOST_DRAFTS,
  SAT_TABLE_VARIABLES,
  TASKS,
  TASKS_WITH_NEW,
  Config,
  ConfigError,
  DataConfig,
  flatten,
  from_config_dict,
  to_dict,
)
from mtp_jax.predictors import (
  KINDS,
  kind_of,
  num_added_layers,
  num_trunk_layers,
  predictor_trunk,
  reading,
)


def validate(
  config: Config,
  num_devices: int | None = None,
  platform: str | None = None,
  given: Collection[str] = (),
) -> None:
  """Checks every rule that involves more than one value's type.

  Args:
    config: what to check.
    num_devices: devices the mesh has to fill; None leaves the mesh product unchecked.
    platform: cpu, gpu or tpu, that of the devices; None leaves kernels unchecked.
    given: dotted keys that were set for this config alone, not for a whole sweep.

  Raises:
    ConfigError: with all broken rules, one per line.
  """
  kind_of(config.mtp)  # Raises where there is no such kind.
  rules = Rules(config)
  _check_ranges(rules)
  rules.raise_if_broken()  # The rules below divide by and compare these values.
  _check_effects(rules, given)
  _check_trunk(rules)
  _check_attention(rules)
  _check_experts(rules)
  _check_mtp(rules)
  _check_data(rules)
  _check_training(rules)
  _check_sharding(rules)
  if num_devices is not None:
    rules.raise_if_broken()
    _check_devices(rules, num_devices)
  if platform is not None:
    _check_platform(rules, platform, num_devices)
  rules.raise_if_broken()


class Rules:
  """Collects the broken rules of one config; called as `rule(holds, key, text)`."""

  def __init__(self, config: Config):
    self.config = config
    self._broken: list[str] = []

  def __call__(self, holds: bool, key: str, text: str) -> None:
    """Notes that the value of `key` must be `text`, unless it `holds`."""
    if not holds:
      value = _get_dotted(self.config, key)
      if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
      self._broken.append(f"{key} must be {text}, got {value!r}.")

  def divisible(self, key: str, by: str) -> None:
    divisor = _get_dotted(self.config, by)
    holds = _get_dotted(self.config, key) % divisor == 0
    self(holds, key, f"divisible by {by} ({divisor})")

  def raise_if_broken(self) -> None:
    if self._broken:
      raise ConfigError("\n".join(self._broken))


_AT_LEAST_1 = (
  "trunk.num_layers", "trunk.embed_dim", "trunk.mlp_dim", "trunk.num_heads",
  "trunk.num_kv_heads", "tokenizer.vocab_size", "data.seq_len",
  "data.batch_size", "optimizer.base_width", "train.num_steps",
  "train.accumulation_steps", "train.log_every", "train.max_nonfinite_steps",
  "trunk.moe.experts_per_token", "trunk.moe.expert_dim", "trunk.moe.num_groups",
  "trunk.moe.groups_per_token", "trunk.latent.kv_rank", "trunk.latent.nope_dim",
  "trunk.latent.rope_dim", "trunk.latent.value_dim",
  "trunk.rope_scaling.original_length", "mesh.fsdp", "mesh.expert", "mesh.tensor",
  "mesh.context", "checkpoint.every_steps", "checkpoint.keep", "eval.num_rows",
  "eval.rows_per_document", "eval.batch_size", "eval.max_new_tokens",
  "task.star_graph.arms", "task.sat.num_clauses", "task.polynomial.max_operators",
  "task.polynomial.held_out_operators", "task.induction.num_names",
  "task.siblings.num_parents",
)
_AT_LEAST_0 = (
  "loss.block_tokens", "mtp.depth", "mtp.mlp_dim", "mtp.draft_vocab",
  "train.eval_every", "train.evals_per_doubling", "train.diagnostics_every",
  "data.num_workers", "eval.line_prompts", "eval.function_prompts",
  "eval.middle_prompts", "trunk.attention_dim",
  "trunk.moe.num_experts", "trunk.moe.num_shared", "trunk.moe.dense_layers",
  "trunk.latent.query_rank", "task.num_train", "task.countdown.num_pauses",
  "task.polynomial.num_pauses", "task.siblings.prefix_length", "eval.task_examples",
  "eval.num_drafts",
)
_FINITE_NOT_NEGATIVE = (
  "mtp.weight", "mtp.final_weight", "mtp.feature_weight", "optimizer.weight_decay",
  "train.stop_value",
  "trunk.moe.bias_rate", "trunk.moe.balance_weight", "trunk.rope_scaling.mscale",
  "trunk.rope_scaling.mscale_all_dim",
)
_FINITE_POSITIVE = (
  "optimizer.learning_rate", "optimizer.eps", "optimizer.clip_norm",
  "trunk.rope_theta", "trunk.norm_eps", "trunk.moe.route_scale",
  "trunk.rope_scaling.low_freq_factor", "trunk.rope_scaling.high_freq_factor",
  "trunk.rope_scaling.beta_fast", "trunk.rope_scaling.beta_slow",
)
_FRACTIONS = (
  "mtp.schedule_fraction", "optimizer.warmup_fraction", "optimizer.decay_fraction",
  "optimizer.final_fraction", "data.validation_fraction", "data.test_fraction",
  "trunk.moe.bias_until", "task.induction.fresh_share",
)


def _choices(section: type, field: str) -> tuple[str, ...]:
  return typing.get_args(typing.get_type_hints(section)[field])


_TEXTS = tuple(x for x in _choices(DataConfig, "source") if x not in TASKS)
_POSITIVE = ()  # The condition that a number is not 0.
_PROMPTS = "eval.line_prompts", "eval.function_prompts", "eval.middle_prompts"
_GROUPED = {"trunk.kind": ("llama",), "trunk.attention_kind": ("grouped",)}
_YARN = {"trunk.rope_scaling.kind": ("yarn",)}
_LLAMA3 = {"trunk.rope_scaling.kind": ("llama3",)}

# Where a key has an effect: every condition holds, which is a key and the values that
# it must have. A section stands for all its keys, but for those that are listed
# themselves. Elsewhere a key must have its default.
_EFFECTS: dict[str, dict[str, tuple]] = {
  "trunk.attention_kind": {"trunk.kind": ("llama",)},
  "trunk.attention_dim": {"trunk.attention_kind": ("grouped",)},
  "trunk.qkv_bias": _GROUPED,
  "trunk.qk_norm": _GROUPED,
  "trunk.latent": {"trunk.attention_kind": ("latent",)},
  "trunk.moe": {"trunk.moe.num_experts": _POSITIVE},
  "trunk.moe.num_experts": {"trunk.kind": ("llama",)},
  "trunk.moe.bias_until": {
    "trunk.moe.num_experts": _POSITIVE, "trunk.moe.bias_rate": _POSITIVE
  },
  "trunk.rope_theta": {"trunk.kind": ("llama",)},
  "trunk.rope_scaling": _YARN,
  "trunk.rope_scaling.kind": {"trunk.kind": ("llama",)},
  "trunk.rope_scaling.factor": {
    "trunk.rope_scaling.kind": ("linear", "llama3", "yarn")
  },
  "trunk.rope_scaling.original_length": {"trunk.rope_scaling.kind": ("llama3", "yarn")},
  "trunk.rope_scaling.low_freq_factor": _LLAMA3,
  "trunk.rope_scaling.high_freq_factor": _LLAMA3,
  "mtp.schedule_fraction": {"mtp.schedule": ("piecewise", "anneal")},
  "mtp.final_weight": {"mtp.schedule": ("piecewise", "linear")},
  "mtp.dense_blocks": {"trunk.moe.num_experts": _POSITIVE},
  "mtp.mlp_dim": {"mtp.depth": _POSITIVE},
  "mtp.unembed": {"mtp.depth": _POSITIVE},
  "mtp.draft_vocab": {"mtp.unembed": ("own",)},
  "mtp.objective": {"mtp.depth": _POSITIVE},
  "mtp.feature_weight": {"mtp.depth": _POSITIVE},
  "tokenizer.path": {"tokenizer.kind": ("file",)},
  "data.path": {"data.source": ("files", "jsonl", "array_record")},
  "data.text_field": {"data.source": ("jsonl",)},
  "data.train_on": {"data.source": _TEXTS},
  "task": {"data.source": TASKS},
  **{f"task.{task}": {"data.source": (task,)} for task in TASKS},
  "optimizer.decay_fraction": {"optimizer.schedule": ("wsd",)},
  "train.stop_value": {
    "train.stop_metric": ("task_accuracy", "task_new", "loss", "bits_per_byte")
  },
  "mesh.expert": {"trunk.moe.num_experts": _POSITIVE},
  "eval.rows_per_document": {"data.source": _TEXTS},
  "eval.max_new_tokens": {"data.source": _TEXTS},
  **{key: {"data.source": _TEXTS} for key in _PROMPTS},
  "eval.task_examples": {"data.source": TASKS},
}
# What weighs the extra depths, or looks at them. The next-token baseline of a sweep has
# these keys like the other trials, so they are refused only where they are `given`.
_OF_DEPTHS = (
  "mtp.weight", "mtp.weighting", "mtp.schedule", "mtp.curriculum",
  "eval.middle_prompts",
)


@functools.cache
def _defaults() -> dict[str, Any]:
  return flatten(to_dict(from_config_dict(base.get_config())))


@functools.cache
def _effects() -> dict[str, dict[str, tuple]]:
  """Returns the conditions by key: its own entry of `_EFFECTS`, or its section's.

  A key of `mtp` that only some kinds read needs one of these too.
  """
  found = {}
  for key in _defaults():
    parts = key.split(".")
    above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    kinds = reading(parts[-1]) if parts[0] == "mtp" else ()
    conditions = {"mtp.kind": kinds} if kinds else {}
    conditions |= next((_EFFECTS[x] for x in above if x in _EFFECTS), {})
    if conditions:
      found[key] = conditions
  return found


def _check_effects(rule: Rules, given: Collection[str]) -> None:
  """A value that nothing reads under the other values is the default."""
  values, effects = flatten(to_dict(rule.config)), _effects()
  if not kind_of(rule.config.mtp).has_depths:
    more = {"mtp.kind": tuple(name for name, x in KINDS.items() if x.has_depths)}
    effects = effects | {
      key: effects.get(key, {}) | more for key in _OF_DEPTHS if key in given
    }
  for key, conditions in effects.items():
    if values[key] == _defaults()[key]:
      continue
    words, found, holds = [], [], True
    for name, allowed in conditions.items():
      value = values[name]
      holds = holds and (value in allowed if allowed else bool(value))
      few = ("one of " if len(allowed) > 1 else "") + ", ".join(map(repr, allowed))
      words.append(f"{name} is {few or 'positive'}")
      found.append(repr(value))
    verb = "they are" if len(found) > 1 else "it is"
    rule(
      holds, key,
      f"{_defaults()[key]!r} unless {' and '.join(words)} ({verb} "
      f"{' and '.join(found)})",
    )


def _check_ranges(rule: Rules) -> None:
  """Values that are out of range whatever the other values are (NaN included)."""
  get = functools.partial(_get_dotted, rule.config)
  for key in _AT_LEAST_1:
    rule(get(key) >= 1, key, "at least 1")
  for key in _AT_LEAST_0:
    rule(get(key) >= 0, key, "at least 0")
  for key in _FINITE_NOT_NEGATIVE:
    rule(math.isfinite(get(key)) and get(key) >= 0, key, "finite and not negative")
  for key in _FINITE_POSITIVE:
    rule(math.isfinite(get(key)) and get(key) > 0, key, "finite and positive")
  seeds = "seed", "data.seed"
  for key in seeds:
    rule(0 <= get(key) < 2**31, key, "in [0, 2^31)")
  for key, value in flatten(to_dict(rule.config)).items():
    if isinstance(value, int) and key not in seeds:
      rule(value < 2**31, key, "less than 2^31: JAX counts in 32 bits")
  for key in ("optimizer.beta1", "optimizer.beta2"):
    rule(0 <= get(key) < 1, key, "in [0, 1)")
  for key in _FRACTIONS:
    rule(0 <= get(key) <= 1, key, "in [0, 1]")
  rule(
    get("eval.num_drafts") <= MOST_DRAFTS, "eval.num_drafts", f"at most {MOST_DRAFTS}"
  )
  factor = get("trunk.rope_scaling.factor")
  rule(
    math.isfinite(factor) and factor >= 1, "trunk.rope_scaling.factor",
    "finite and at least 1",
  )
  data = get("mesh.data")
  rule(data == -1 or data >= 1, "mesh.data", "-1 (the rest) or at least 1")


def _check_trunk(rule: Rules) -> None:
  trunk = rule.config.trunk
  if trunk.kind == "gpt2":
    rule(
      trunk.num_kv_heads == trunk.num_heads, "trunk.num_kv_heads",
      f"equal to trunk.num_heads ({trunk.num_heads}) for trunk.kind 'gpt2'",
    )
  rule(
    trunk.compute_dtype != "float64" or jax.config.jax_enable_x64,
    "trunk.compute_dtype", "'auto', 'float32' or 'bfloat16' unless the environment has "
    "JAX_ENABLE_X64=1: JAX makes float32 of it",
  )
  layers, mtp = num_trunk_layers(rule.config), rule.config.mtp
  rule(
    layers >= 1, "trunk.num_layers",
    f"large enough to leave a trunk of at least 1 layer (mtp.kind {mtp.kind!r}, depth "
    f"{mtp.depth}, arm {mtp.arm!r} leave {layers})",
  )


def _check_attention(rule: Rules) -> None:
  trunk = rule.config.trunk
  if trunk.attention_kind == "latent":
    rule(
      trunk.num_kv_heads == trunk.num_heads, "trunk.num_kv_heads",
      f"equal to trunk.num_heads ({trunk.num_heads}) for latent attention",
    )
    rule(trunk.latent.rope_dim % 2 == 0, "trunk.latent.rope_dim", "even")
  else:
    of = "trunk.attention_dim" if trunk.attention_dim else "trunk.embed_dim"
    rule.divisible(of, "trunk.num_heads")
    rule.divisible("trunk.num_heads", "trunk.num_kv_heads")
    if trunk.kind == "llama":
      rule(
        trunk.head_dim % 2 == 0, of,
        f"such that {of.removeprefix('trunk.')} / num_heads is even for RoPE (it is "
        f"{trunk.head_dim})",
      )
  scaling = trunk.rope_scaling
  if scaling.kind == "llama3":
    rule(
      scaling.high_freq_factor > scaling.low_freq_factor,
      "trunk.rope_scaling.high_freq_factor",
      f"larger than low_freq_factor ({scaling.low_freq_factor})",
    )
  if scaling.kind == "yarn":
    rule(
      scaling.beta_fast > scaling.beta_slow, "trunk.rope_scaling.beta_fast",
      f"larger than beta_slow ({scaling.beta_slow})",
    )
    rule(trunk.rope_theta > 1, "trunk.rope_theta", "more than 1 for yarn")


def _check_experts(rule: Rules) -> None:
  moe = rule.config.trunk.moe
  if moe.num_experts == 0:
    return
  rule(
    moe.dense_layers < num_trunk_layers(rule.config), "trunk.moe.dense_layers",
    f"less than the layers of the trunk ({num_trunk_layers(rule.config)})",
  )
  rule.divisible("trunk.moe.num_experts", "trunk.moe.num_groups")
  rule.divisible("trunk.moe.num_experts", "mesh.expert")
  rule(
    moe.groups_per_token <= moe.num_groups, "trunk.moe.groups_per_token",
    f"at most trunk.moe.num_groups ({moe.num_groups})",
  )
  group = moe.num_experts // moe.num_groups
  rule(
    moe.num_groups == 1 or group >= 2, "trunk.moe.num_groups",
    "such that a group has at least 2 experts: its score is the sum of the best two",
  )
  available = group * moe.groups_per_token
  rule(
    moe.experts_per_token <= available, "trunk.moe.experts_per_token",
    f"at most the experts of groups_per_token groups ({available})",
  )


def _check_mtp(rule: Rules) -> None:
  mtp, seq_len = rule.config.mtp, rule.config.data.seq_len
  kind_of(mtp).rules(rule)
  rule(mtp.depth < seq_len, "mtp.depth", f"less than data.seq_len ({seq_len})")
  rule(
    len(mtp.depth_weights) in (0, mtp.depth), "mtp.depth_weights",
    f"empty or of length mtp.depth ({mtp.depth})",
  )
  rule(
    all(math.isfinite(w) and w >= 0 for w in mtp.depth_weights), "mtp.depth_weights",
    "finite and not negative",
  )
  if mtp.mlp_dim:
    rule(
      mtp.arm != "shortened", "mtp.mlp_dim",
      "0 for mtp.arm 'shortened', which trades whole layers of the trunk",
    )
    rule(
      predictor_trunk(rule.config.trunk, mtp).moe.num_experts == 0, "mtp.mlp_dim",
      "0 where the modules have experts (mtp.dense_blocks False)",
    )
  vocab = rule.config.tokenizer.vocab_size
  rule(
    mtp.draft_vocab <= vocab, "mtp.draft_vocab",
    f"at most tokenizer.vocab_size ({vocab})",
  )
  most = rule.config.eval.num_drafts
  further = [repr(name) for name, kind in KINDS.items() if kind.is_autoregressive]
  rule(
    most <= mtp.depth or (kind_of(mtp).is_autoregressive and mtp.depth > 0),
    "eval.num_drafts",
    f"at most mtp.depth ({mtp.depth}) unless mtp.kind is one of {', '.join(further)} "
    f"with extra depths (it is {mtp.kind!r})",
  )
  if mtp.arm == "shortened":
    rule(
      num_added_layers(mtp) > 0, "mtp.arm",
      f"'added' or 'flops': kind {mtp.kind!r} at depth {mtp.depth} adds no layer",
    )
  if mtp.arm == "flops":
    rule(
      mtp.depth > 0, "mtp.arm",
      "'added' at mtp.depth 0: there are no extra FLOPs to match",
    )


def _check_data(rule: Rules) -> None:
  data, tokenizer, limits = rule.config.data, rule.config.tokenizer, rule.config.eval
  if data.source in ("files", "jsonl", "array_record"):
    rule(bool(data.path), "data.path", f"set for data.source {data.source!r}")
  if data.source == "jsonl":
    rule(bool(data.text_field), "data.text_field", "set for data.source 'jsonl'")
  rule(
    data.validation_fraction + data.test_fraction < 1, "data.validation_fraction",
    f"such that it and data.test_fraction ({data.test_fraction}) leave text to train "
    "on",
  )
  split = f"data.{limits.split}_fraction"
  rule(
    _get_dotted(rule.config, split) > 0, split,
    f"positive: the evaluation reads it (eval.split {limits.split!r})",
  )
  if rule.config.train.eval_test:
    for key in ("data.validation_fraction", "data.test_fraction"):
      rule(
        _get_dotted(rule.config, key) > 0, key,
        "positive: validations read it (train.eval_test)",
      )
  is_task = data.source in TASKS
  rule(
    (tokenizer.kind == "symbols") == is_task, "tokenizer.kind",
    f"'symbols' for a task and for nothing else (data.source is {data.source!r})",
  )
  rule(
    is_task or rule.config.mtp.score_from == "start", "mtp.score_from",
    f"'start' unless data.source is a task (it is {data.source!r})",
  )
  if is_task:
    _check_task(rule)
  minimum = {"bytes": 258, "bpe": 258, "file": 1, "symbols": 1}[tokenizer.kind]
  rule(
    tokenizer.vocab_size >= minimum, "tokenizer.vocab_size",
    f"at least {minimum} for tokenizer.kind {tokenizer.kind!r}",
  )
  if tokenizer.kind == "file":
    rule(bool(tokenizer.path), "tokenizer.path", "set for tokenizer.kind 'file'")
  has_prompts = (
    limits.line_prompts or limits.function_prompts or limits.middle_prompts
  )
  if has_prompts and not is_task:
    rule(
      limits.max_new_tokens < data.seq_len, "eval.max_new_tokens",
      f"less than data.seq_len ({data.seq_len}), to leave room for a prompt",
    )


def _check_task(rule: Rules) -> None:
  task = rule.config.task
  rule(task.star_graph.length >= 2, "task.star_graph.length", "at least 2")
  num_nodes = 1 + task.star_graph.arms * (task.star_graph.length - 1)
  rule(
    task.star_graph.num_labels >= num_nodes, "task.star_graph.num_labels",
    f"at least the number of nodes ({num_nodes})",
  )
  rule(task.sat.num_variables >= 3, "task.sat.num_variables", "at least 3")
  if task.sat.unique:
    rule(
      task.sat.num_variables <= SAT_TABLE_VARIABLES, "task.sat.num_variables",
      f"at most {SAT_TABLE_VARIABLES} if task.sat.unique, which tries them all",
    )
    rule(
      task.sat.num_clauses >= 3 * task.sat.num_variables, "task.sat.num_clauses",
      f"at least 3 * task.sat.num_variables ({3 * task.sat.num_variables}) with "
      "task.sat.unique: with fewer, hardly any formula has one solution",
    )
  rule(task.countdown.num_inputs >= 2, "task.countdown.num_inputs", "at least 2")
  rule(task.countdown.largest >= 10, "task.countdown.largest", "at least 10")
  rule(task.siblings.num_children >= 2, "task.siblings.num_children", "at least 2")
  rule(task.induction.num_sentences >= 3, "task.induction.num_sentences", "at least 3")
  halves, names = task.induction.num_halves, task.induction.num_names
  rule(
    2 <= halves <= names <= halves * (halves - 1), "task.induction.num_names",
    f"from num_halves ({halves}, at least 2), so that every half occurs, to "
    "num_halves * (num_halves - 1), so that every first half has a new name",
  )
  rule(
    not task.induction.fresh_share or names <= halves * (halves - 2),
    "task.induction.num_names",
    f"at most num_halves * (num_halves - 2) ({halves * (halves - 2)}) with "
    "task.induction.fresh_share, so that there are fresh names and held-out ones",
  )


def _check_training(rule: Rules) -> None:
  if rule.config.train.freeze_trunk:
    rule(
      rule.config.mtp.depth > 0, "train.freeze_trunk",
      "False at mtp.depth 0: there would be nothing to train",
    )
  mtp, trunk_layers = rule.config.mtp, num_trunk_layers(rule.config)
  if trunk_layers < rule.config.trunk.num_layers:
    rule(
      not rule.config.train.trunk_from, "train.trunk_from",
      f"'' for mtp.kind {mtp.kind!r} with arm {mtp.arm!r}: its trunk of {trunk_layers} "
      "layer(s) is shorter than the deployed model, trunk.num_layers "
      f"({rule.config.trunk.num_layers})",
    )
  _check_stop(rule)
  train, optimizer = rule.config.train, rule.config.optimizer
  rule(
    not (train.start_from and train.trunk_from), "train.start_from",
    f"'' beside train.trunk_from ({train.trunk_from!r})",
  )
  rule.divisible("data.batch_size", "train.accumulation_steps")
  if optimizer.schedule == "wsd":
    rule(
      optimizer.warmup_fraction + optimizer.decay_fraction <= 1,
      "optimizer.warmup_fraction",
      f"such that it and optimizer.decay_fraction ({optimizer.decay_fraction}) fit "
      "into training",
    )


def _check_stop(rule: Rules) -> None:
  """The metric that ends training is measured, and can have its value."""
  train, source = rule.config.train, rule.config.data.source
  key = "train.stop_metric"
  if not train.stop_metric:
    return
  rule(
    train.eval_every > 0 or train.evals_per_doubling > 0, key,
    "'' without validations (train.eval_every and train.evals_per_doubling are 0)",
  )
  if not train.stop_metric.startswith("task_"):
    return
  examples, num_train = rule.config.eval.task_examples, rule.config.task.num_train
  rule(
    source in TASKS and examples > 0, key,
    "'', 'loss' or 'bits_per_byte' unless data.source is a task and eval.task_examples "
    f"is positive (they are {source!r} and {examples})",
  )
  if train.stop_metric == "task_new":
    rule(
      source in TASKS_WITH_NEW and num_train > 0, key,
      f"another metric unless data.source is one of {', '.join(TASKS_WITH_NEW)} and "
      f"task.num_train is positive (they are {source!r} and {num_train})",
    )
  rule(0 < train.stop_value <= 1, "train.stop_value", "in (0, 1] for an accuracy")


def _check_sharding(rule: Rules) -> None:
  """Sharded dimensions divide evenly."""
  rule.divisible("data.seq_len", "mesh.context")
  for key in (
    "trunk.num_heads", "trunk.num_kv_heads", "trunk.mlp_dim", "mtp.mlp_dim",
    "mtp.draft_vocab", "tokenizer.vocab_size",
  ):
    rule.divisible(key, "mesh.tensor")
  if rule.config.trunk.moe.num_experts:
    rule.divisible("trunk.moe.expert_dim", "mesh.tensor")
  rule.divisible("trunk.embed_dim", "mesh.fsdp")
  if rule.config.trunk.attention_kind == "latent":
    for key in ("trunk.latent.query_rank", "trunk.latent.kv_rank"):
      rule.divisible(key, "mesh.fsdp")


def _check_devices(rule: Rules, num_devices: int) -> None:
  """The mesh fills the devices, and the rows divide over it."""
  config, mesh = rule.config, rule.config.mesh
  fixed = mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
  data = num_devices // fixed if mesh.data == -1 else mesh.data
  product = "fsdp * expert * tensor * context"
  if mesh.data != -1:
    product = f"data * {product}"
  verb = "divides" if mesh.data == -1 else "equals"
  rule(
    data * fixed == num_devices, "mesh",
    f"such that {product} {verb} the number of devices ({num_devices})",
  )
  rule.raise_if_broken()
  shards = data * mesh.fsdp * mesh.expert
  microbatch = config.data.batch_size // config.train.accumulation_steps
  rule(
    microbatch % shards == 0, "data.batch_size",
    f"such that a microbatch ({microbatch} rows) divides over mesh data * fsdp * "
    f"expert ({shards})",
  )
  rule(
    config.eval.batch_size % shards == 0, "eval.batch_size",
    f"divisible by mesh data * fsdp * expert ({shards})",
  )


def _check_platform(
  rule: Rules, platform: str, num_devices: int | None
) -> None:
  """The kernels that are named run on the platform; see `kernels.attention`."""
  trunk, key = rule.config.trunk, "trunk.attention"
  if trunk.attention == "tokamax":
    rule(
      importlib.util.find_spec("tokamax") is not None, key,
      f"'auto', 'xla' or 'blocked' on platform {platform!r} where the package tokamax "
      "is not installed",
    )
    rule(num_devices in (None, 1), key, f"another on {num_devices} devices")
  if trunk.attention != "cudnn":
    return
  rule(
    platform in ("gpu", "cuda"), key,
    f"'auto', 'xla' or 'blocked' on platform {platform!r}: cuDNN is of NVIDIA GPUs",
  )
  sizes, head_dim = trunk.latent, trunk.head_dim
  if trunk.attention_kind == "latent":
    head_dim = sizes.nope_dim + sizes.rope_dim
    rule(
      head_dim == sizes.value_dim, key,
      f"another where values ({sizes.value_dim}) differ in size from keys ({head_dim})",
    )
  for holds, why in (
    (trunk.compute_dtype in ("auto", "bfloat16"), "is not in 16-bit floats"),
    (head_dim % 8 == 0, f"has heads of {head_dim}, not a multiple of 8"),
    (rule.config.data.seq_len % 2 == 0, "has rows of odd length (data.seq_len)"),
    (rule.config.mesh.context == 1, "splits the sequence (mesh.context)"),
  ):
    rule(holds, key, f"another where attention {why}")


def _get_dotted(config: Any, key: str) -> Any:
  node = config
  for part in key.split("."):
    node = getattr(node, part)
  return node
