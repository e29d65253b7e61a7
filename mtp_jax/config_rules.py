"""Which configs can work: every rule that involves more than one value's type.

A message has the dotted key, the rule and the value.
"""

import dataclasses
import math
from collections.abc import Collection

import jax

from mtp_jax import machine_rules
from mtp_jax.config import (
  SAT_TABLE_VARIABLES,
  TASKS,
  TASKS_WITH_NEW,
  Config,
  ConfigError,
  flatten,
  get_dotted,
  keys,
  to_dict,
)
from mtp_jax.data import mixture
from mtp_jax.effects import conditions, has_effect
from mtp_jax.keys import INT32, SEED, Range
from mtp_jax.predictors import (
  KINDS,
  kind_of,
  num_added_layers,
  num_drafts,
  num_trunk_layers,
  predictor_trunk,
)
from mtp_jax.rotary_rules import check_rope_scaling, check_rotated_heads


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
    platform: of the devices, cpu, gpu or tpu; None leaves kernels unchecked.
    given: dotted keys that were set for this config alone, not for a whole sweep.

  Raises:
    ConfigError: with all broken rules, one per line.
  """
  kind_of(config.mtp)  # Raises where there is no such kind.
  rules = Rules(config)
  _check_ranges(rules)
  rules.raise_if_broken()  # The rules below divide by and compare these values.
  _check_effects(rules, given)
  _check_pairs(rules)
  machine_rules.check_memory(rules, config)
  _check_trunk(rules)
  _check_attention(rules)
  _check_experts(rules)
  _check_mtp(rules)
  _check_data(rules)
  _check_training(rules)
  if num_devices is not None:
    rules.raise_if_broken()
    _check_devices(rules, num_devices)
  if platform is not None:
    machine_rules.check_kernels(rules, config, platform, num_devices)
    if num_devices is not None:
      machine_rules.check_parameters(rules, config, platform, num_devices)
  rules.raise_if_broken()


class Rules:
  """Collects the broken rules of one config; called as `rule(holds, key, text)`."""

  def __init__(self, config: Config):
    self.config = config
    self._broken: list[str] = []

  def __call__(self, holds: bool, key: str, text: str) -> None:
    """Notes that the value of `key` must be `text`, unless it `holds`."""
    if not holds:
      value = get_dotted(self.config, key)
      value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
      self._broken.append(f"{key} must be {text}, got {value!r}.")

  def divisible(self, key: str, by: str) -> None:
    divisor = get_dotted(self.config, by)
    holds = get_dotted(self.config, key) % divisor == 0
    self(holds, key, f"divisible by {by} ({divisor})")

  def raise_if_broken(self) -> None:
    if self._broken:
      raise ConfigError("\n".join(self._broken))


def _check_ranges(rule: Rules) -> None:
  """Every value is in its range, whatever the other values are (NaN included)."""
  for name, key in sorted(keys().items()):
    value = get_dotted(rule.config, name)
    is_int = isinstance(value, int) and SEED not in key.ranges
    for allowed in (*key.ranges, *((INT32,) if is_int else ())):
      rule(allowed.holds(value), name, allowed.text)


def _check_effects(rule: Rules, given: Collection[str]) -> None:
  """A value that nothing reads under the other values is the default."""
  values = flatten(to_dict(rule.config))
  for name, key in keys().items():
    if get_dotted(rule.config, name) == key.default:
      continue
    missing = conditions(name)
    if has_effect(missing, values):
      more = key.then | (key.when_given if name in given else {})
      missing = {k: v for k, v in more.items() if not has_effect({k: v}, values)}
    if not missing:
      continue
    words, found = [], []
    for names, allowed in missing.items():
      names = (names,) if isinstance(names, str) else names
      texts = [allowed.text] if isinstance(allowed, Range) else map(repr, allowed)
      few = "one of " if len(texts := list(texts)) > 1 else ""
      words.append(f"{' or '.join(names)} is {few}{', '.join(texts)}")
      found += [repr(values[x]) for x in names]
    verb = "they are" if len(found) > 1 else "it is"
    there = f"({verb} {' and '.join(found)})"
    rule(False, name, f"{key.default!r} unless {' and '.join(words)} {there}")
  trunk, mtp = rule.config.trunk, rule.config.mtp
  if "mtp.kind" in given and mtp.depth == 0 and not kind_of(mtp).deployed_blocks:
    text = "'none' unless mtp.depth is positive (it is 0)"
    rule(not kind_of(mtp).has_depths, "mtp.kind", text)
  blocks = predictor_trunk(trunk, mtp) if num_added_layers(mtp) else trunk
  if "trunk.mlp_dim" in given and trunk.moe.num_experts and blocks.moe.num_experts:
    rule(
      trunk.moe.dense_layers > 0, "trunk.mlp_dim",
      f"{keys()['trunk.mlp_dim'].default} where every layer has experts "
      "(trunk.moe.dense_layers is 0)",
    )


def _check_pairs(rule: Rules) -> None:
  """No key is larger than the one that bounds it; sharded dimensions divide evenly."""
  values = flatten(to_dict(rule.config))
  for name, key in keys().items():
    if key.most and has_effect(conditions(name), values):
      most = values[key.most]
      rule(values[name] <= most, name, f"at most {key.most} ({most})")
    if key.by and has_effect(conditions(name), values):
      rule.divisible(name, key.by)


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
      check_rotated_heads(rule, trunk)
  check_rope_scaling(rule, trunk)


def _check_experts(rule: Rules) -> None:
  moe = rule.config.trunk.moe
  if moe.num_experts == 0:
    return
  rule(
    moe.dense_layers < num_trunk_layers(rule.config), "trunk.moe.dense_layers",
    f"less than the layers of the trunk ({num_trunk_layers(rule.config)})",
  )
  rule.divisible("trunk.moe.num_experts", "trunk.moe.num_groups")
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
  # One weight a depth; a negative one would reward errors.
  rule(
    len(mtp.depth_weights) in (0, mtp.depth), "mtp.depth_weights",
    f"empty or of length mtp.depth ({mtp.depth})",
  )
  rule(
    all(math.isfinite(w) and w >= 0 for w in mtp.depth_weights), "mtp.depth_weights",
    "finite and not negative",
  )
  rule(
    not (mtp.detach and kind_of(mtp).deployed_blocks), "mtp.detach",
    f"False for mtp.kind {mtp.kind!r}: its first head is a layer of the trunk",
  )
  # A width of its own has no meaning where layers are traded, or experts have theirs.
  if mtp.mlp_dim:
    rule(
      mtp.arm != "shortened", "mtp.mlp_dim",
      "0 for mtp.arm 'shortened', which trades whole layers of the trunk",
    )
    rule(
      predictor_trunk(rule.config.trunk, mtp).moe.num_experts == 0, "mtp.mlp_dim",
      "0 where the modules have experts (mtp.dense_blocks False)",
    )
  # Only a kind that reads its own output can draft more tokens than it has depths.
  most = rule.config.eval.num_drafts
  further = [repr(name) for name, kind in KINDS.items() if kind.is_autoregressive]
  rule(
    most <= num_drafts(mtp) or (kind_of(mtp).is_autoregressive and mtp.depth > 0),
    "eval.num_drafts",
    f"at most the tokens that the predictors draft ({num_drafts(mtp)}) unless mtp.kind "
    f"is one of {', '.join(further)} with extra depths (it is {mtp.kind!r})",
  )
  # An arm that would equal `added` is a trial trained twice.
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
  values = flatten(to_dict(rule.config))
  for key in ("data.path", "data.text_field", "tokenizer.path"):
    ((of, kinds),) = keys()[key].when.items()
    is_needed = values[of] in kinds
    rule(bool(values[key]) or not is_needed, key, f"set for {of} {values[of]!r}")
  # The splits that are read must have text.
  rule(
    data.validation_fraction + data.test_fraction < 1, "data.validation_fraction",
    f"such that it and data.test_fraction ({data.test_fraction}) leave text to train "
    "on",
  )
  readers = {limits.split: f"the evaluation reads it (eval.split {limits.split!r})"}
  if rule.config.train.eval_test:
    reader = "validations read it (train.eval_test)"
    readers = {"validation": reader, "test": reader} | readers
  for split, reader in readers.items():
    key = f"data.{split}_fraction"
    rule(values[key] > 0, key, f"positive: {reader}")
  # Ids of stored tokens mean nothing without their tokenizer.
  try:
    parts = mixture.parts(data)
  except ValueError as error:
    parts = rule(False, "data.path", str(error)) or []
  sources = {part.data.source for part in parts}
  rule(
    data.source != "mixture" or tokenizer.kind != "bpe", "tokenizer.kind",
    "'file' or 'bytes' for data.source 'mixture': each part would learn its own",
  )
  rule(
    "token_bin" not in sources or tokenizer.kind == "file", "tokenizer.kind",
    "'file' for data.source 'token_bin': tokenizer.path names the tokens' tokenizer",
  )
  # Tasks draw symbols, and know where a prompt ends; text has neither.
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
  prompts = limits.line_prompts, limits.function_prompts, limits.middle_prompts
  if any(prompts) and not is_task:
    rule(
      limits.max_new_tokens < data.seq_len, "eval.max_new_tokens",
      f"less than data.seq_len ({data.seq_len}), to leave room for a prompt",
    )


def _check_task(rule: Rules) -> None:
  task = rule.config.task
  num_nodes = 1 + task.star_graph.arms * (task.star_graph.length - 1)
  rule(
    task.star_graph.num_labels >= num_nodes, "task.star_graph.num_labels",
    f"at least the number of nodes ({num_nodes})",
  )
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
