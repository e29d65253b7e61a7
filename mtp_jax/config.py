"""The whole experiment as frozen dataclasses without defaults.

`experiments/base.py` holds every value once, as an ml_collections ConfigDict. This
module turns such a dict into typed, immutable sections (`from_config_dict`), refuses
what cannot work before any work is done (`validate`), and says what a config means
for the model (`resolve`). Every error names the dotted key, the rule and the value.
"""

import dataclasses
import difflib
import functools
import math
import typing
from typing import Any, Literal


class ConfigError(ValueError):
  """A config value that breaks a rule; the message has dotted key, rule and value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
  """How rotary frequencies change for texts longer than `original_length`.

  kind: none | linear | llama3 (`low_freq_factor`, `high_freq_factor`) | yarn
        (`beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`); see model/rotary.py.
  """

  kind: Literal["none", "linear", "llama3", "yarn"]
  factor: float
  original_length: int
  low_freq_factor: float
  high_freq_factor: float
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
  """Sizes of multi-head latent attention (DeepSeek-V3, equations 1 to 11).

  query_rank: of the compressed query; 0 projects queries directly.
  kv_rank:    of the compressed vector that keys and values are made from.
  nope_dim, rope_dim: per head, the part of query and key without and with rotation; the
              rotated key is shared by all heads.
  value_dim:  per head.
  """

  query_rank: int
  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Mixture of experts (DeepSeek-V3, equations 12 to 20); no expert is a dense model.

  num_experts:  routed experts per layer; 0 makes every layer dense.
  experts_per_token, expert_dim: of the routed ones, each a SwiGLU of this width.
  num_shared:   experts that see every token, merged into one SwiGLU.
  dense_layers: so many first layers of the trunk stay dense (`trunk.mlp_dim`).
  num_groups, groups_per_token: experts are chosen within the best groups (nodes).
  route_scale:  factor on the normalised gates.
  bias_rate:    gamma, the step of the balancing bias; 0 keeps it at zero.
  bias_until:   fraction of training after which gamma is 0.
  balance_weight: alpha of the sequence-wise balance loss.
  grouped_matmul: auto | ragged (`jax.lax.ragged_dot`) | blocked; see
                model/grouped_matmul.py.
  """

  num_experts: int
  experts_per_token: int
  expert_dim: int
  num_shared: int
  dense_layers: int
  num_groups: int
  groups_per_token: int
  route_scale: float
  bias_rate: float
  bias_until: float
  balance_weight: float
  grouped_matmul: Literal["auto", "ragged", "blocked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig:
  """The shared trunk. `num_layers` counts the layers of the deployed NTP model.

  kind:           llama (RMSNorm, RoPE, SwiGLU) | gpt2 (LayerNorm, learned positions,
                  GELU, biases).
  attention_dim:  num_heads * head_dim of grouped attention; 0 is `embed_dim`.
  attention_kind: grouped | latent (sizes in `latent`; needs kind `llama`).
  qkv_bias, qk_norm: biases of query, key and value (Qwen2); RMSNorm of every query and
                  key head (Qwen3); both for grouped attention of kind `llama`.
  """

  kind: Literal["llama", "gpt2"]
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  attention_dim: int
  attention_kind: Literal["grouped", "latent"]
  latent: LatentConfig
  moe: MoeConfig
  qkv_bias: bool
  qk_norm: bool
  tie_embeddings: bool
  rope_theta: float
  rope_scaling: RopeScalingConfig
  norm_eps: float
  scan_layers: bool
  remat: Literal["none", "names", "full"]
  compute_dtype: Literal["auto", "float32", "bfloat16", "float64"]
  attention: Literal["auto", "xla", "blocked", "cudnn"]

  @property
  def head_dim(self) -> int:
    return (self.attention_dim or self.embed_dim) // self.num_heads

  @property
  def dense_prefix(self) -> int:
    """How many layers come before the first with experts, where there are any."""
    return self.moe.dense_layers if self.moe.num_experts else 0

  def dense(self) -> "TrunkConfig":
    """Returns the trunk that its dense layers see: the same without experts."""
    return dataclasses.replace(
      self, moe=dataclasses.replace(self.moe, num_experts=0, dense_layers=0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpConfig:
  """What is predicted beyond the next token, and how much it weighs.

  kind:       none | parallel, sequential, linear, medusa (`model.mtp`) | eagle, eagle3
              (`drafters.eagle`; needs grouped attention).
  depth:      D extra tokens; 0 is plain next-token prediction.
  weight:     lambda. `mean` gives each depth lambda / D, `sum` gives each lambda.
  schedule:   lambda over training: constant | piecewise (`weight` until
              `schedule_fraction` of the steps, then `final_weight`) | linear (from
              `weight` to `final_weight`) | anneal (linear to 0, reached at
              `schedule_fraction`).
  depth_weights: relative weight of each depth; empty means all equal.
  curriculum: none | forward (depths switched on one by one) | reverse (switched off).
  dense_blocks: sequential modules have dense blocks where the trunk has experts.
  mlp_dim:    width of the dense feed-forward layers of sequential modules and of
              EAGLE; 0 is `trunk.mlp_dim`.
  hidden:     the state that sequential module k starts from at position i: chained (of
              module k - 1 at i) | trunk (the trunk's at i) | trunk_shifted (the trunk's
              at i + k - 1, of the token before the one that it is fed; see
              `model.mtp.SequentialModules` for where there is none).
  hidden_norm: the trunk's state as the modules get it: after or before the final norm.
  fed:        the token i + k whose embedding module k sees: true | none (zeros) | own
              (the most likely one by depth k - 1).
  unembed:    the output matrix of the extra depths: shared (the trunk's) | own (one of
              their own, which begins as a copy of the trunk's).
  draft_vocab: so many most frequent tokens of the training text are all that EAGLE-3
              with an output matrix of its own can draft; 0: every token.
  objective:  what the extra depths minimise, see `losses.OBJECTIVES`: cross_entropy
              (with the data) | kl | tv | log_acceptance (with the trunk's own
              distribution of the same token).
  feature_weight: weight of the distance between the states of the extra depths and
              those of the trunk for the same token (EAGLE), relative to `objective`.
  arm:        added (extra modules on top of the deployed model) | shortened (the trunk
              loses as many layers as they add) | flops (plain NTP that is trained for
              the FLOPs that this kind and depth would have cost).
  """

  kind: Literal[
    "none", "parallel", "sequential", "linear", "medusa", "eagle", "eagle3"
  ]
  depth: int
  weight: float
  weighting: Literal["mean", "sum"]
  schedule: Literal["constant", "piecewise", "linear", "anneal"]
  schedule_fraction: float
  final_weight: float
  depth_weights: tuple[float, ...]
  curriculum: Literal["none", "forward", "reverse"]
  share_modules: bool
  dense_blocks: bool
  mlp_dim: int
  hidden: Literal["chained", "trunk", "trunk_shifted"]
  hidden_norm: Literal["after", "before"]
  fed: Literal["true", "none", "own"]
  unembed: Literal["shared", "own"]
  draft_vocab: int
  objective: Literal["cross_entropy", "kl", "tv", "log_acceptance"]
  feature_weight: float
  arm: Literal["added", "shortened", "flops"]

  @property
  def is_autoregressive(self) -> bool:
    """Whether depth k follows from depth k - 1 and the token before its target."""
    return self.kind in AUTOREGRESSIVE


# Drafters of one layer that goes on from its own output, as often as is wanted.
EAGLES = ("eagle", "eagle3")

# The kinds that can draft more tokens than they have depths.
AUTOREGRESSIVE = ("sequential", *EAGLES)


# What the modules of DeepSeek-V3 start from, by key of `MtpConfig`; no other kind of
# predictor has the choice.
PUBLISHED_INPUTS = {"hidden": "chained", "hidden_norm": "after", "fed": "true"}

# The kinds that may have output matrices of their own.
OWN_UNEMBED = ("medusa", "eagle3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """`block_tokens`: positions whose logits are alive at once, per device."""

  block_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """bytes | bpe (trained on the corpus) | file (a Hugging Face tokenizer.json) |
  symbols (the words of a task).

  `vocab_size` is the size of the embedding: at least what the tokenizer needs.
  """

  kind: Literal["bytes", "bpe", "file", "symbols"]
  vocab_size: int
  path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where text comes from and how it becomes rows.

  source:     stdlib | site_packages (sources of the installed packages) | files
              (`path`: folder or glob) | jsonl (`path`: file or glob, plain, .gz or
              .zst) | array_record (`path`: folder written by launch.prepare) |
              language_reference, stories (see data/generated.py) | one of `TASKS`,
              generated (section `task`).
  train_on:   "" trains on the source's train split; else on the texts of this JSONL
              file, as launch.write_corpus writes it. What is evaluated, and what a BPE
              tokenizer learns from, is of the source all the same.
  batch_size: sequences per optimizer step, over all devices and microbatches.
  seed:       order of documents and rows; independent of the model's seed.
  """

  source: Literal[
    "stdlib", "site_packages", "files", "jsonl", "array_record", "language_reference",
    "stories", "star_graph", "sat", "countdown", "polynomial", "induction", "siblings",
  ]
  path: str
  text_field: str
  train_on: str
  seq_len: int
  batch_size: int
  seed: int
  validation_fraction: float
  test_fraction: float
  num_workers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarGraphConfig:
  """G(`arms`, `length`): nodes per arm, source and goal included; `num_labels` names.

  reversed: the answer is the path from goal to source.
  """

  arms: int
  length: int
  num_labels: int
  reversed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatConfig:
  num_variables: int
  num_clauses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig:
  """`largest`: of inputs, intermediate results and target; `num_pauses` before the
  answer.
  """

  num_inputs: int
  largest: int
  num_pauses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolynomialConfig:
  """Most operations of an expression, in training and held out; pauses before the
  answer.
  """

  max_operators: int
  held_out_operators: int
  num_pauses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionConfig:
  """A name is one of `num_halves` words, then one of as many others; `num_names` of
  these pairs occur in training.
  """

  num_sentences: int
  num_halves: int
  num_names: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiblingsConfig:
  num_parents: int
  num_children: int
  prefix_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """Sizes of the synthetic tasks (`data.source`); see data/tasks.

  num_train: examples of the training set; 0 never repeats one.
  """

  num_train: int
  star_graph: StarGraphConfig
  sat: SatConfig
  countdown: CountdownConfig
  polynomial: PolynomialConfig
  induction: InductionConfig
  siblings: SiblingsConfig


# Values of `data.source` that are generated, and need `tokenizer.kind` "symbols".
TASKS = ("star_graph", "sat", "countdown", "polynomial", "induction", "siblings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """`learning_rate` is the peak for width `base_width`; see optimizer.py."""

  kind: Literal["adamw", "muon"]
  learning_rate: float
  base_width: int
  schedule: Literal["cosine", "wsd"]
  warmup_fraction: float
  decay_fraction: float
  final_fraction: float
  weight_decay: float
  beta1: float
  beta2: float
  eps: float
  clip_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long to train, what, and how often to look.

  diagnostics_every: steps between comparisons of MTP and NTP gradient; 0 = off.
  freeze_trunk: only the extra predictors (`mtp` in the parameter tree) learn; the rest
    stays as it is, bit for bit.
  trunk_from: folder of the run whose newest deployed model (all but the extra
    predictors) a new run begins with; empty begins at random.
  """

  num_steps: int
  accumulation_steps: int
  log_every: int
  eval_every: int
  diagnostics_every: int
  max_nonfinite_steps: int
  freeze_trunk: bool
  trunk_from: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; `data = -1` takes all that are left.

  `expert` splits the experts, and the rows of a batch like `data` does.
  """

  data: int
  fsdp: int
  expert: int
  tensor: int
  context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  every_steps: int
  keep: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """What the final evaluation measures.

  num_rows:       validation or test rows of `seq_len` tokens.
  rows_per_document: at most so many rows of one document, so that many are covered.
  line_prompts, function_prompts: held-out prompts of the generative metrics; 0 = off.
  middle_prompts: held-out documents, of any text, that are continued from their middle
                  by sampling, to measure how often drafts are accepted; 0: functions
                  are continued instead.
  max_new_tokens: longest greedy completion.
  num_drafts:     drafts per round of decoding; 0 is one per extra depth, and sequential
                  modules go on from their own output for more.
  task_examples: held-out examples of a task that are answered and scored; 0 = off.
  """

  split: Literal["validation", "test"]
  num_rows: int
  rows_per_document: int
  batch_size: int
  line_prompts: int
  function_prompts: int
  middle_prompts: int
  max_new_tokens: int
  num_drafts: int
  task_examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  name: str
  seed: int
  trunk: TrunkConfig
  mtp: MtpConfig
  loss: LossConfig
  tokenizer: TokenizerConfig
  data: DataConfig
  task: TaskConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  eval: EvalConfig


def from_config_dict(values: Any) -> Config:
  """Builds a `Config` from a ConfigDict or plain nested dict.

  Raises:
    ConfigError: unknown key (with the nearest valid one), missing key, wrong type, or
      a value outside a closed set of choices.
  """
  if hasattr(values, "to_dict"):
    values = values.to_dict()
  return _build(Config, values, "")


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


def dotted_keys(section: type = Config, prefix: str = "") -> list[str]:
  """Returns every dotted key, those of sections included."""
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


def num_added_layers(mtp: MtpConfig) -> int:
  """Transformer layers that training has and the deployed NTP model has not."""
  if mtp.depth == 0 or mtp.kind in ("none", "linear", "medusa"):
    return 0
  if mtp.kind in EAGLES or (mtp.kind == "sequential" and mtp.share_modules):
    return 1
  return mtp.depth


def next_token_only(mtp: MtpConfig) -> MtpConfig:
  """Returns the section without any extra predictor, on top of the whole trunk."""
  return dataclasses.replace(
    mtp, kind="none", depth=0, depth_weights=(), share_modules=False,
    dense_blocks=False, mlp_dim=0, unembed="shared", draft_vocab=0,
    objective="cross_entropy", feature_weight=0.0, arm="added", **PUBLISHED_INPUTS,
  )


def routed_layers(config: Config) -> dict[str, int]:
  """Returns how many layers with experts there are in the `trunk` and in `mtp`.

  These are the routings of one forward pass: a shared module counts once per depth.
  A part without any is left out.
  """
  mtp, moe = config.mtp, config.trunk.moe
  if moe.num_experts == 0:
    return {}
  in_mtp = {"parallel": 1 + mtp.depth, "sequential": mtp.depth}.get(mtp.kind, 0)
  if mtp.dense_blocks:
    in_mtp = 0
  in_trunk = num_trunk_layers(config) - moe.dense_layers
  return {"trunk": in_trunk} | ({"mtp": in_mtp} if in_mtp else {})


def learns_from_trunk(mtp: MtpConfig) -> bool:
  """Whether the extra depths learn from what the trunk says, not from data alone."""
  return mtp.objective != "cross_entropy" or mtp.feature_weight > 0


def predictor_trunk(trunk: TrunkConfig, mtp: MtpConfig) -> TrunkConfig:
  """Returns the trunk that the blocks of the extra predictors are built from."""
  trunk = trunk.dense() if mtp.dense_blocks or mtp.kind in EAGLES else trunk
  return dataclasses.replace(trunk, mlp_dim=mtp.mlp_dim or trunk.mlp_dim)


def num_trunk_layers(config: Config) -> int:
  """Layers of the shared trunk, given the kind of predictor and the fairness arm.

  `trunk.num_layers` counts what is deployed for next-token prediction. Parallel heads
  deploy their first head, so their trunk is one layer shorter than the NTP trunk: with
  D = 0 they are the same function. In the `shortened` arm (Gloeckle et al. 2024,
  section 3) the trunk also gives up the layers of the extra modules.
  """
  layers = config.trunk.num_layers
  if config.mtp.kind == "parallel":
    layers -= 1
  if config.mtp.arm == "shortened":
    layers -= num_added_layers(config.mtp)
  return layers


def tapped_layers(config: Config) -> tuple[int, ...]:
  """Returns after how many trunk layers the streams are taken that EAGLE-3 starts from.

  Other kinds start from the last stream alone: (). The published ones are after 2, L/2
  and L - 3 of L layers (Li et al. 2025, arXiv 2503.01840, and its code); a trunk of
  less than 8 has them after the first, the middle and the last layer.
  """
  if config.mtp.kind != "eagle3":
    return ()
  layers = num_trunk_layers(config)
  if layers < 8:
    return 1, (1 + layers) // 2, layers
  return 2, layers // 2, layers - 3


def validate(config: Config, num_devices: int | None = None) -> None:
  """Checks every rule that involves more than one value's type.

  Args:
    config: what to check.
    num_devices: devices the mesh has to fill; None leaves the mesh product unchecked.

  Raises:
    ConfigError: with all broken rules, one per line.
  """
  rules = _Rules(config)
  _check_ranges(rules)
  rules.raise_if_broken()  # The rules below divide by and compare these values.
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
  rules.raise_if_broken()


class _Rules:
  """Collects the broken rules of one config."""

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
  "trunk.num_kv_heads", "loss.block_tokens", "tokenizer.vocab_size", "data.seq_len",
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
  "mtp.depth", "mtp.mlp_dim", "mtp.draft_vocab", "train.eval_every",
  "train.diagnostics_every", "data.num_workers",
  "eval.line_prompts", "eval.function_prompts", "eval.middle_prompts",
  "trunk.attention_dim",
  "trunk.moe.num_experts", "trunk.moe.num_shared", "trunk.moe.dense_layers",
  "trunk.latent.query_rank", "task.num_train", "task.countdown.num_pauses",
  "task.polynomial.num_pauses", "task.siblings.prefix_length", "eval.task_examples",
  "eval.num_drafts",
)
_FINITE_NOT_NEGATIVE = (
  "mtp.weight", "mtp.final_weight", "mtp.feature_weight", "optimizer.weight_decay",
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
  "trunk.moe.bias_until",
)


def _check_ranges(rule: _Rules) -> None:
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
  for key in ("optimizer.beta1", "optimizer.beta2"):
    rule(0 <= get(key) < 1, key, "in [0, 1)")
  for key in _FRACTIONS:
    rule(0 <= get(key) <= 1, key, "in [0, 1]")
  for key in ("seed", "data.seed"):
    rule(0 <= get(key) < 2**31, key, "in [0, 2^31)")
  factor = get("trunk.rope_scaling.factor")
  rule(
    math.isfinite(factor) and factor >= 1, "trunk.rope_scaling.factor",
    "finite and at least 1",
  )
  data = get("mesh.data")
  rule(data == -1 or data >= 1, "mesh.data", "-1 (the rest) or at least 1")


def _check_trunk(rule: _Rules) -> None:
  trunk = rule.config.trunk
  if trunk.kind == "gpt2":
    rule(
      trunk.num_kv_heads == trunk.num_heads, "trunk.num_kv_heads",
      f"equal to trunk.num_heads ({trunk.num_heads}) for trunk.kind 'gpt2'",
    )
    for key, plain in (
      ("attention_kind", "grouped"), ("qkv_bias", False), ("qk_norm", False),
      ("moe.num_experts", 0), ("rope_scaling.kind", "none"),
    ):
      rule(
        _get_dotted(trunk, key) == plain, f"trunk.{key}",
        f"{plain!r} for trunk.kind 'gpt2'",
      )
  layers, mtp = num_trunk_layers(rule.config), rule.config.mtp
  rule(
    layers >= 1, "trunk.num_layers",
    f"large enough to leave a trunk of at least 1 layer (mtp.kind {mtp.kind!r}, depth "
    f"{mtp.depth}, arm {mtp.arm!r} leave {layers})",
  )


def _check_attention(rule: _Rules) -> None:
  trunk = rule.config.trunk
  if trunk.attention_kind == "latent":
    rule(
      trunk.num_kv_heads == trunk.num_heads, "trunk.num_kv_heads",
      f"equal to trunk.num_heads ({trunk.num_heads}) for latent attention",
    )
    rule(trunk.latent.rope_dim % 2 == 0, "trunk.latent.rope_dim", "even")
    for key, plain in (("qkv_bias", False), ("qk_norm", False), ("attention_dim", 0)):
      rule(
        getattr(trunk, key) == plain, f"trunk.{key}", f"{plain!r} for latent attention"
      )
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


def _check_experts(rule: _Rules) -> None:
  moe, mtp = rule.config.trunk.moe, rule.config.mtp
  if mtp.dense_blocks:
    rule(
      moe.num_experts > 0 and mtp.kind == "sequential", "mtp.dense_blocks",
      f"False unless the trunk has experts and mtp.kind is 'sequential' (it is "
      f"{mtp.kind!r} with {moe.num_experts} experts)",
    )
  if moe.num_experts == 0:
    rule(
      rule.config.mesh.expert == 1, "mesh.expert",
      "1 without experts (trunk.moe.num_experts 0)",
    )
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


def _check_mtp(rule: _Rules) -> None:
  mtp, seq_len = rule.config.mtp, rule.config.data.seq_len
  if mtp.kind == "none":
    rule(mtp.depth == 0, "mtp.depth", "0 for mtp.kind 'none'")
  if mtp.kind in EAGLES:
    rule(mtp.depth >= 1, "mtp.depth", f"at least 1 for mtp.kind {mtp.kind!r}")
    rule(
      rule.config.trunk.attention_kind == "grouped", "trunk.attention_kind",
      f"'grouped' for mtp.kind {mtp.kind!r}",
    )
  rule(mtp.depth < seq_len, "mtp.depth", f"less than data.seq_len ({seq_len})")
  rule(
    len(mtp.depth_weights) in (0, mtp.depth), "mtp.depth_weights",
    f"empty or of length mtp.depth ({mtp.depth})",
  )
  rule(
    all(math.isfinite(w) and w >= 0 for w in mtp.depth_weights), "mtp.depth_weights",
    "finite and not negative",
  )
  if mtp.share_modules:
    rule(
      mtp.kind == "sequential", "mtp.share_modules",
      f"False unless mtp.kind is 'sequential' (it is {mtp.kind!r})",
    )
  if mtp.mlp_dim:
    rule(
      mtp.is_autoregressive and mtp.depth > 0, "mtp.mlp_dim",
      f"0 unless mtp.kind is one of {', '.join(map(repr, AUTOREGRESSIVE))} with extra "
      f"depths (it is {mtp.kind!r} with depth {mtp.depth})",
    )
    rule(
      mtp.arm != "shortened", "mtp.mlp_dim",
      "0 for mtp.arm 'shortened', which trades whole layers of the trunk",
    )
    rule(
      predictor_trunk(rule.config.trunk, mtp).moe.num_experts == 0, "mtp.mlp_dim",
      "0 where the modules have experts (mtp.dense_blocks False)",
    )
  for key, published in PUBLISHED_INPUTS.items():
    rule(
      mtp.kind == "sequential" or getattr(mtp, key) == published, f"mtp.{key}",
      f"{published!r} unless mtp.kind is 'sequential' (it is {mtp.kind!r})",
    )
  rule(
    mtp.unembed == "shared" or (mtp.kind in OWN_UNEMBED and mtp.depth > 0),
    "mtp.unembed",
    f"'shared' unless mtp.kind is one of {', '.join(map(repr, OWN_UNEMBED))} with "
    f"extra depths (it is {mtp.kind!r} with depth {mtp.depth})",
  )
  if mtp.draft_vocab:
    rule(
      mtp.kind == "eagle3" and mtp.unembed == "own", "mtp.draft_vocab",
      "0 unless mtp.kind is 'eagle3' and mtp.unembed 'own' (they are "
      f"{mtp.kind!r} and {mtp.unembed!r})",
    )
    vocab = rule.config.tokenizer.vocab_size
    rule(
      mtp.draft_vocab <= vocab, "mtp.draft_vocab",
      f"at most tokenizer.vocab_size ({vocab})",
    )
  for key, plain in (("objective", "cross_entropy"), ("feature_weight", 0.0)):
    rule(
      getattr(mtp, key) == plain or mtp.depth > 0, f"mtp.{key}",
      f"{plain!r} at mtp.depth 0: only extra depths learn from the trunk",
    )
  most = rule.config.eval.num_drafts
  rule(
    most <= mtp.depth or (mtp.is_autoregressive and mtp.depth > 0), "eval.num_drafts",
    f"at most mtp.depth ({mtp.depth}) unless mtp.kind is one of "
    f"{', '.join(map(repr, AUTOREGRESSIVE))} with extra depths (it is {mtp.kind!r})",
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


def _check_data(rule: _Rules) -> None:
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
  is_task = data.source in TASKS
  rule(
    (tokenizer.kind == "symbols") == is_task, "tokenizer.kind",
    f"'symbols' for a task and for nothing else (data.source is {data.source!r})",
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


def _check_task(rule: _Rules) -> None:
  task = rule.config.task
  rule(not rule.config.data.train_on, "data.train_on", "'' for a task")
  rule(task.star_graph.length >= 2, "task.star_graph.length", "at least 2")
  num_nodes = 1 + task.star_graph.arms * (task.star_graph.length - 1)
  rule(
    task.star_graph.num_labels >= num_nodes, "task.star_graph.num_labels",
    f"at least the number of nodes ({num_nodes})",
  )
  rule(task.sat.num_variables >= 3, "task.sat.num_variables", "at least 3")
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


def _check_training(rule: _Rules) -> None:
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
  optimizer = rule.config.optimizer
  rule.divisible("data.batch_size", "train.accumulation_steps")
  if optimizer.schedule == "wsd":
    rule(
      optimizer.warmup_fraction + optimizer.decay_fraction <= 1,
      "optimizer.warmup_fraction",
      f"such that it and optimizer.decay_fraction ({optimizer.decay_fraction}) fit "
      "into training",
    )


def _check_sharding(rule: _Rules) -> None:
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


def _check_devices(rule: _Rules, num_devices: int) -> None:
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


def _build(cls: type, values: Any, prefix: str) -> Any:
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


def _get_dotted(config: Any, key: str) -> Any:
  node = config
  for part in key.split("."):
    node = getattr(node, part)
  return node


def _unknown_key(key: str) -> str:
  matches = difflib.get_close_matches(key, dotted_keys(), n=1, cutoff=0.5)
  return f"{key}: unknown key" + (f"; did you mean {matches[0]!r}?" if matches else ".")


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


