"""The whole experiment as frozen dataclasses without defaults.

`experiments/base.py` holds every value once, as an ml_collections ConfigDict. This
module turns such a dict into typed, immutable sections (`from_config_dict`) and says
what they mean for the model. What cannot work is refused before any work is done, by
`config_rules.validate`. Every error names the dotted key, the rule and the value.
"""

import dataclasses
import difflib
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
                kernels/grouped_matmul.py.
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
  attention:      how it is computed: auto | xla | blocked | cudnn | tokamax; see
                  kernels/attention.py.
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
  attention: Literal["auto", "xla", "blocked", "cudnn", "tokamax"]

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

  kind:       of the predictors, see `predictors.KINDS`.
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
              `predictors.sequential` for where there is none).
  hidden_norm: the trunk's state as the modules get it: after or before the final norm.
  fed:        the token i + k whose embedding module k sees: true | none (zeros) | own
              (the most likely one by depth k - 1).
  out_norm:   what the output matrix and the next sequential module read: own (the
              output of the block after a norm of the module's own) | none (the output
              as it is). launch/README.md has what published systems do.
  norm:       kind of the norms of a sequential module besides those in its block:
              trunk (that of the trunk) | rms (RMSNorm on any trunk).
  unembed:    the output matrix of the extra depths: shared (the trunk's) | own (one of
              their own, which begins as a copy of the trunk's).
  draft_vocab: so many most frequent tokens of the training text are all that EAGLE-3
              with an output matrix of its own can draft; 0: every token.
  objective:  what the extra depths minimise, see `losses.OBJECTIVES`: cross_entropy
              (with the data) | kl | tv | log_acceptance (with the trunk's own
              distribution of the same token).
  feature_weight: weight of the distance between the states of the extra depths and
              those of the trunk for the same token (EAGLE), relative to `objective`.
  score_from: where the extra depths are scored in an example of a task: start (wherever
              their target belongs to the answer) | answer (only at positions whose next
              token belongs to it: nobody can tell an answer before the end of the
              prompt).
  arm:        added (extra modules on top of the deployed model) | shortened (the trunk
              loses as many layers as they add) | flops (plain NTP that is trained for
              the FLOPs that this kind and depth would have cost).
  """

  kind: str
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
  out_norm: Literal["own", "none"]
  norm: Literal["trunk", "rms"]
  unembed: Literal["shared", "own"]
  draft_vocab: int
  objective: Literal["cross_entropy", "kl", "tv", "log_acceptance"]
  feature_weight: float
  score_from: Literal["start", "answer"]
  arm: Literal["added", "shortened", "flops"]


# What the modules of DeepSeek-V3 start from, by key of `MtpConfig`; no other kind of
# predictor has the choice.
PUBLISHED_INPUTS = {"hidden": "chained", "hidden_norm": "after", "fed": "true"}

# The same with their norms: RMSNorm, as their trunk has.
PUBLISHED_MODULES = PUBLISHED_INPUTS | {"out_norm": "own", "norm": "trunk"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """`block_tokens`: positions whose logits are alive at once, per device.

  0: 1024 on a CPU, 4096 elsewhere.
  """

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


# Most variables of formulas whose assignments are all tried.
SAT_TABLE_VARIABLES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatConfig:
  """unique: exactly one assignment satisfies a formula; for at most
  `SAT_TABLE_VARIABLES` variables, since all assignments are tried.
  """

  num_variables: int
  num_clauses: int
  unique: bool


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

  fresh_share: share of training stories whose names are drawn from all pairs, alike,
    but for a tenth of those that are not among the `num_names`, which stays held out;
    0: all pairs that are not among the `num_names` are held out.
  """

  num_sentences: int
  num_halves: int
  num_names: int
  fresh_share: float


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


# Drafts of a round; every one is a part of the program, which is compiled for minutes.
MOST_DRAFTS = 64

# Values of `data.source` that are generated, and need `tokenizer.kind` "symbols".
TASKS = ("star_graph", "sat", "countdown", "polynomial", "induction", "siblings")

# Of these, the tasks whose answers can be new, see `evaluate.task_metrics`.
TASKS_WITH_NEW = ("induction", "siblings")


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

  eval_every: steps between validations; 0 = off.
  evals_per_doubling: validations for each doubling of the step, k of them after the
    steps round(2^(j / k)), each once; 0 = off. Both kinds may be on, and where one is,
    the last step is validated too.
  eval_test: each validation also measures the test split, in a record of its own, and
    validation records are of the validation split whatever `eval.split` is.
  stop_metric, stop_value: training ends when this field of validation records (`loss`
    is that of depth 0) has reached the value twice in a row, accuracies from below and
    losses from above; empty trains for all steps.
  diagnostics_every: steps between comparisons of MTP and NTP gradient; 0 = off.
  freeze_trunk: only the extra predictors (`mtp` in the parameter tree) learn; the rest
    stays as it is, bit for bit.
  trunk_from: folder of the run whose newest deployed model (all but the extra
    predictors) a new run begins with; empty begins at random.
  start_from: the same, with the extra predictors: a new run, from step 0 and with a new
    optimizer state, on from all parameters of that one.
  """

  num_steps: int
  accumulation_steps: int
  log_every: int
  eval_every: int
  evals_per_doubling: int
  eval_test: bool
  stop_metric: Literal["", "task_accuracy", "task_new", "loss", "bits_per_byte"]
  stop_value: float
  diagnostics_every: int
  max_nonfinite_steps: int
  freeze_trunk: bool
  trunk_from: str
  start_from: str


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


def next_token_only(mtp: MtpConfig) -> MtpConfig:
  """Returns the section without any extra predictor, on top of the whole trunk."""
  return dataclasses.replace(
    mtp, kind="none", depth=0, depth_weights=(), share_modules=False,
    dense_blocks=False, mlp_dim=0, unembed="shared", draft_vocab=0,
    objective="cross_entropy", feature_weight=0.0, score_from="start",
    arm="added", **PUBLISHED_MODULES,
  )


def essential(config: Config) -> Config:
  """Returns the config with one value for all that decides nothing about a run.

  Runs of equal ones have the same bits. That is the name, and, of a run that trains no
  extra depth, what weighs them.
  """
  mtp = config.mtp
  if mtp.depth == 0:
    mtp = dataclasses.replace(
      mtp, weight=0.0, weighting="mean", schedule="constant", schedule_fraction=1.0,
      final_weight=0.0, curriculum="none",
    )
  return dataclasses.replace(config, name="", mtp=mtp)


def learns_from_trunk(mtp: MtpConfig) -> bool:
  """Whether the extra depths learn from what the trunk says, not from data alone."""
  return mtp.objective != "cross_entropy" or mtp.feature_weight > 0


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


def _unknown_key(key: str) -> str:
  matches = difflib.get_close_matches(key, dotted_keys(), n=1, cutoff=0.5)
  return f"{key}: unknown key" + (f"; did you mean {matches[0]!r}?" if matches else ".")


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


