"""Every rule of the config, by its message: dotted key, rule, value."""

import dataclasses
import json
import pickle
import re

import jax
import pytest

from experiments import base
from mtp_jax import config as config_lib
from mtp_jax import config_rules, effects, machine_rules, predictors, program
from mtp_jax.config import ConfigError
from mtp_jax.keys import ABOVE_0, FRACTION, HOST, NOT_NEGATIVE, Range

NAN, INF = float("nan"), float("inf")


def make(**overrides):
  """Returns the base config; `mtp__depth=2` sets `mtp.depth`."""
  values = {key.replace("__", "."): value for key, value in overrides.items()}
  default = config_lib.from_config_dict(base.get_config())
  return config_lib.with_overrides(default, values)


def error_of(config, num_devices=None, platform=None):
  with pytest.raises(ConfigError) as caught:
    config_rules.validate(config, num_devices, platform)
  return str(caught.value)


def test_base_is_valid_on_one_and_on_eight_devices():
  config_rules.validate(make())
  config_rules.validate(make(), 1)
  config_rules.validate(make(), 8)


@pytest.mark.parametrize("key, value, message", [
  ("mtp.dept", 1, "mtp.dept: unknown key; did you mean 'mtp.depth'?"),
  ("depth", 1, "depth: unknown key; did you mean 'mtp.depth'?"),
  ("mtp.depth.k", 1, "mtp.depth.k: unknown key; did you mean 'mtp.depth'?"),
  ("train.checkpoint_every", 1,
   "train.checkpoint_every: unknown key; did you mean 'checkpoint.every_steps'?"),
  ("train.learning_rate", 1,
   "train.learning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
  ("data.depth", 1, "data.depth: unknown key; did you mean 'mtp.depth'?"),
  ("model.embed_dim", 1,
   "model.embed_dim: unknown key; did you mean 'trunk.embed_dim'?"),
  ("lerning_rate", 1,
   "lerning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
  ("train.steps", 1, "train.steps: unknown key; did you mean 'train.num_steps'?"),
  ("train.batch_size", 1,
   "train.batch_size: unknown key; did you mean 'data.batch_size'?"),
  ("qqqq", 1, "qqqq: unknown key."),
  ("mtp.depth", 2.0, "mtp.depth must be of type int, got 2.0."),
  ("mtp.depth", True, "mtp.depth must be of type int, got True."),
  ("mtp.depth", None, "mtp.depth must be of type int, got None."),
  ("mtp.weight", "0.3", "mtp.weight must be of type float, got '0.3'."),
  ("mtp.share_modules", 1, "mtp.share_modules must be of type bool, got 1."),
  ("name", 3, "name must be of type str, got 3."),
  ("mtp", 3, "mtp must be a section, got 3."),
  (
    "mtp.fed", "mine", "mtp.fed must be one of 'true', 'none', 'own', got 'mine'."
  ),
  (
    "mtp.depth_weights", 1.0,
    "mtp.depth_weights must be a sequence of float, got 1.0.",
  ),
  (
    "mtp.depth_weights", (1.0, "x"),
    "mtp.depth_weights[1] must be of type float, got 'x'.",
  ),
])
def test_keys_and_types(key, value, message):
  with pytest.raises(ConfigError) as caught:
    make(**{key: value})
  assert str(caught.value) == message


def test_whole_numbers_serve_as_floats():
  config = make(mtp__weight=1, mtp__depth_weights=[1, 0.5])
  assert config.mtp.weight == 1.0 and type(config.mtp.weight) is float
  assert config.mtp.depth_weights == (1.0, 0.5)


def test_unknown_and_missing_keys_of_a_config_dict():
  unknown = base.get_config()
  unknown.data.batchsize = 8
  with pytest.raises(ConfigError, match=r"data.batchsize: unknown.*'data.batch_size'"):
    config_lib.from_config_dict(unknown)
  missing = base.get_config()
  del missing.mtp.depth
  with pytest.raises(ConfigError, match=r"^mtp.depth: missing key.$"):
    config_lib.from_config_dict(missing)


def test_what_an_older_version_saved_has_the_defaults_of_newer_keys():
  config = make(mtp__kind="sequential", mtp__depth=2)
  saved = config_lib.to_dict(config)
  del saved["mtp"]["detach"], saved["trunk"]["moe"], saved["task"]["siblings"]
  assert config_lib.from_saved(saved) == config
  for broken in ({}, saved | {"mtp": []}, {k: saved[k] for k in saved if k != "mtp"}):
    with pytest.raises(ConfigError):
      config_lib.from_saved(broken)
  saved["mtp"]["gone"] = 1
  with pytest.raises(ConfigError, match=r"^mtp.gone: unknown"):
    config_lib.from_saved(saved)


KEYS = config_lib.keys()


def keys_in(*allowed):
  return [key for key, facts in KEYS.items() if set(allowed) & set(facts.ranges)]


LEAST = [
  (key, allowed)
  for key, facts in KEYS.items()
  for allowed in facts.ranges
  if allowed.text.startswith("at least")
]


@pytest.mark.parametrize("key, allowed", LEAST)
def test_at_least(key, allowed):
  below = int(allowed.text.removeprefix("at least ")) - 1
  assert f"{key} must be {allowed.text}, got {below}." in error_of(make(**{key: below}))


def test_every_number_has_a_range():
  numbers = {k for k, facts in KEYS.items() if type(facts.default) in (int, float)}
  # Checked with other keys: `config_rules._check_task`.
  assert numbers - {k for k, facts in KEYS.items() if facts.ranges} == {
    "task.star_graph.num_labels", "task.induction.num_halves"
  }


def test_defaults_are_those_of_the_base_experiment_and_in_range():
  assert base.get_config().to_dict() == config_lib.defaults()
  assert make() == config_lib.from_config_dict(config_lib.defaults())
  for key, facts in KEYS.items():
    assert facts.meaning
    for allowed in facts.ranges:
      assert allowed.holds(facts.default), (key, allowed.text)


@pytest.mark.parametrize("key", [
  key for key in config_lib.dotted_keys()
  if config_lib.type_name(key) == "int" and not key.endswith("seed")
])
def test_no_number_has_more_than_32_bits(key):
  message = f"{key} must be less than 2^31: JAX counts in 32 bits, got 2147483648."
  assert message in error_of(make(**{key: 2**31}))


def test_num_drafts_has_the_bound_of_the_decoder():
  config = make(mtp__kind="sequential", mtp__depth=1, eval__num_drafts=65)
  assert error_of(config) == "eval.num_drafts must be at most 64, got 65."


@pytest.mark.parametrize("key", keys_in(NOT_NEGATIVE))
@pytest.mark.parametrize("value", [-0.1, NAN, INF])
def test_finite_and_not_negative(key, value):
  message = f"{key} must be finite and not negative, got {value}."
  assert error_of(make(**{key: value})) == message


@pytest.mark.parametrize("key", keys_in(ABOVE_0))
@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_finite_and_positive(key, value):
  message = f"{key} must be finite and positive, got {value}."
  assert error_of(make(**{key: value})) == message


@pytest.mark.parametrize("key", keys_in(FRACTION))
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_fractions(key, value):
  assert error_of(make(**{key: value})) == f"{key} must be in [0, 1], got {value}."


LATENT = {"trunk.attention_kind": "latent", "trunk.num_kv_heads": 4}
EXPERTS = {"trunk.moe.num_experts": 8}
TASK = {
  "data.source": "siblings", "tokenizer.kind": "symbols", "tokenizer.vocab_size": 5000,
  "task.num_train": 10, "train.evals_per_doubling": 2, "train.stop_value": 0.95,
}
QUIET = TASK | {"train.stop_value": 0.0}  # Nothing ends training.
RULES = {
  "kind": (
    {"mtp.kind": "eagle2"},
    "mtp.kind must be one of 'none', 'parallel', 'sequential', 'linear', 'medusa', "
    "'eagle', 'eagle3', 'peagle', 'dflash', 'top', got 'eagle2'.",
  ),
  "seed": ({"seed": -1}, "seed must be in [0, 2^31), got -1."),
  "data seed": (
    {"data.seed": 2**31}, "data.seed must be in [0, 2^31), got 2147483648."
  ),
  "beta": ({"optimizer.beta2": 1.0}, "optimizer.beta2 must be in [0, 1), got 1.0."),
  "mesh data": (
    {"mesh.data": 0}, "mesh.data must be -1 (the rest) or at least 1, got 0."
  ),
  "heads": (
    {"trunk.num_heads": 3, "trunk.num_kv_heads": 3},
    "trunk.embed_dim must be divisible by trunk.num_heads (3), got 128.",
  ),
  "kv heads": (
    {"trunk.num_kv_heads": 3},
    "trunk.num_heads must be divisible by trunk.num_kv_heads (3), got 4.",
  ),
  "rope": (
    {"trunk.embed_dim": 12},
    "trunk.embed_dim must be such that embed_dim / num_heads is even for RoPE (it is "
    "3), got 12.",
  ),
  "gpt2 kv heads": (
    {"trunk.kind": "gpt2"},
    "trunk.num_kv_heads must be equal to trunk.num_heads (4) for trunk.kind 'gpt2', "
    "got 2.",
  ),
  "shortened trunk": (
    {"mtp.kind": "parallel", "mtp.depth": 3, "mtp.arm": "shortened"},
    "trunk.num_layers must be large enough to leave a trunk of at least 1 layer "
    "(mtp.kind 'parallel', depth 3, arm 'shortened' leave 0), got 4.",
  ),
  "one parallel layer": (
    {"mtp.kind": "parallel", "trunk.num_layers": 1},
    "trunk.num_layers must be large enough to leave a trunk of at least 1 layer "
    "(mtp.kind 'parallel', depth 0, arm 'added' leave 0), got 1.",
  ),
  "depth without kind": (
    {"mtp.depth": 2}, "mtp.depth must be 0 for mtp.kind 'none', got 2."
  ),
  "seq_len too short for D": (
    {"mtp.kind": "linear", "mtp.depth": 8, "data.seq_len": 8, "eval.line_prompts": 0,
     "eval.function_prompts": 0},
    "mtp.depth must be less than data.seq_len (8), got 8.",
  ),
  "number of depth weights": (
    {"mtp.kind": "linear", "mtp.depth": 2, "mtp.depth_weights": (1.0,)},
    "mtp.depth_weights must be empty or of length mtp.depth (2), got (1.0,).",
  ),
  "NaN depth weight": (
    {"mtp.kind": "linear", "mtp.depth": 1, "mtp.depth_weights": (NAN,)},
    "mtp.depth_weights must be finite and not negative, got (nan,).",
  ),
  **{
    f"shared modules of {kind}": (
      {"mtp.kind": kind, "mtp.depth": 1, "mtp.share_modules": True},
      "mtp.share_modules must be False unless mtp.kind is 'sequential' (it is "
      f"{kind!r}), got True.",
    )
    for kind in ("parallel", "medusa", "eagle")
  },
  **{
    f"a trunk that is too short for {kind} {arm}": (
      {"mtp.kind": kind, "mtp.depth": 1, "mtp.arm": arm, "train.trunk_from": "runs/x"},
      f"train.trunk_from must be '' for mtp.kind {kind!r} with arm {arm!r}: its trunk "
      "of 3 layer(s) is shorter than the deployed model, trunk.num_layers (4), got "
      "'runs/x'.",
    )
    for kind, arm in (("parallel", "added"), ("sequential", "shortened"))
  },
  "two runs to begin with": (
    {"train.trunk_from": "runs/x", "train.start_from": "runs/y"},
    "train.start_from must be '' beside train.trunk_from ('runs/x'), got 'runs/y'.",
  ),
  **{
    key: (
      {"mtp.kind": "parallel", "mtp.depth": 1, key: value},
      f"{key} must be {plain!r} unless mtp.kind is 'sequential' (it is 'parallel'), "
      f"got {value!r}.",
    )
    for key, plain, value in (
      ("mtp.hidden", "chained", "trunk"), ("mtp.hidden_norm", "after", "before"),
      ("mtp.fed", "true", "own"), ("mtp.out_norm", "own", "none"),
      ("mtp.norm", "trunk", "rms"),
    )
  },
  "own output matrices of sequential modules": (
    {"mtp.kind": "sequential", "mtp.depth": 1, "mtp.unembed": "own"},
    "mtp.unembed must be 'shared' unless mtp.kind is one of 'medusa', 'eagle3', "
    "'peagle', 'dflash', 'top' and mtp.depth is positive (they are 'sequential' and "
    "1), got 'own'.",
  ),
  "a teacher of nothing": (
    {"mtp.objective": "kl"},
    "mtp.objective must be 'cross_entropy' unless mtp.depth is positive (it is 0), got "
    "'kl'.",
  ),
  "negative feature weight": (
    {"mtp.kind": "sequential", "mtp.depth": 1, "mtp.feature_weight": -1.0},
    "mtp.feature_weight must be finite and not negative, got -1.0.",
  ),
  "feed-forward width of heads": (
    {"mtp.kind": "parallel", "mtp.depth": 1, "mtp.mlp_dim": 64},
    "mtp.mlp_dim must be 0 unless mtp.kind is one of 'sequential', 'eagle', 'eagle3', "
    "'peagle', 'dflash' and mtp.depth is positive (they are 'parallel' and 1), got "
    "64.",
  ),
  "feed-forward width of layers that are traded": (
    {
      "mtp.kind": "sequential", "mtp.depth": 1, "mtp.mlp_dim": 64,
      "mtp.arm": "shortened",
    },
    "mtp.mlp_dim must be 0 for mtp.arm 'shortened', which trades whole layers of the "
    "trunk, got 64.",
  ),
  "more drafts than heads": (
    {"mtp.kind": "medusa", "mtp.depth": 2, "eval.num_drafts": 3},
    "eval.num_drafts must be at most the tokens that the predictors draft (2) unless "
    "mtp.kind is one of "
    "'sequential', 'eagle', 'eagle3' with extra depths (it is 'medusa'), got 3.",
  ),
  "EAGLE without a step": (
    {"mtp.kind": "eagle", "mtp.depth": 0},
    "mtp.depth must be at least 1 for mtp.kind 'eagle', got 0.",
  ),
  "EAGLE on a trunk with latent attention": (
    {
      "mtp.kind": "eagle3", "mtp.depth": 1, "trunk.attention_kind": "latent",
      "trunk.num_kv_heads": 4,
    },
    "trunk.attention_kind must be 'grouped' for mtp.kind 'eagle3', got 'latent'.",
  ),
  "draft vocabulary of a shared matrix": (
    {"mtp.kind": "eagle3", "mtp.depth": 1, "mtp.draft_vocab": 9},
    "mtp.draft_vocab must be 0 unless mtp.kind is one of 'eagle3', 'peagle', "
    "'dflash' and mtp.unembed is 'own' (they are 'eagle3' and 'shared'), got 9.",
  ),
  "draft vocabulary larger than the vocabulary": (
    {
      "mtp.kind": "eagle3", "mtp.depth": 1, "mtp.unembed": "own",
      "mtp.draft_vocab": 265,
    },
    "mtp.draft_vocab must be at most tokenizer.vocab_size (264), got 265.",
  ),
  "nothing to shorten": (
    {"mtp.kind": "linear", "mtp.depth": 1, "mtp.arm": "shortened"},
    "mtp.arm must be 'added' or 'flops': kind 'linear' at depth 1 adds no layer, got "
    "'shortened'.",
  ),
  "no FLOPs to match": (
    {"mtp.arm": "flops"},
    "mtp.arm must be 'added' at mtp.depth 0: there are no extra FLOPs to match, got "
    "'flops'.",
  ),
  "path of files": (
    {"data.source": "files"}, "data.path must be set for data.source 'files', got ''."
  ),
  "path of array_record": (
    {"data.source": "array_record"},
    "data.path must be set for data.source 'array_record', got ''.",
  ),
  "attention dim": (
    {"trunk.attention_dim": 90},
    "trunk.attention_dim must be divisible by trunk.num_heads (4), got 90.",
  ),
  "odd head of its own size": (
    {"trunk.attention_dim": 12},
    "trunk.attention_dim must be such that attention_dim / num_heads is even for RoPE "
    "(it is 3), got 12.",
  ),
  "latent heads": (
    {"trunk.attention_kind": "latent"},
    "trunk.num_kv_heads must be equal to trunk.num_heads (4) for latent attention, got "
    "2.",
  ),
  "latent with biases": (
    LATENT | {"trunk.qkv_bias": True},
    "trunk.qkv_bias must be False unless trunk.kind is 'llama' and "
    "trunk.attention_kind is 'grouped' (they are 'llama' and 'latent'), got True.",
  ),
  "odd rotary part": (
    LATENT | {"trunk.latent.rope_dim": 5},
    "trunk.latent.rope_dim must be even, got 5.",
  ),
  "gpt2 with experts": (
    {"trunk.kind": "gpt2", "trunk.num_kv_heads": 4} | EXPERTS,
    "trunk.moe.num_experts must be 0 unless trunk.kind is 'llama' (it is 'gpt2'), got "
    "8.",
  ),
  "rotary factor": (
    {"trunk.rope_scaling.factor": 0.5},
    "trunk.rope_scaling.factor must be finite and at least 1, got 0.5.",
  ),
  "llama3 bands": (
    {"trunk.rope_scaling.kind": "llama3", "trunk.rope_scaling.high_freq_factor": 1.0},
    "trunk.rope_scaling.high_freq_factor must be larger than low_freq_factor (1.0), "
    "got 1.0.",
  ),
  "yarn bands": (
    {"trunk.rope_scaling.kind": "yarn", "trunk.rope_scaling.beta_fast": 1.0},
    "trunk.rope_scaling.beta_fast must be larger than beta_slow (1.0), got 1.0.",
  ),
  "yarn base": (
    {"trunk.rope_scaling.kind": "yarn", "trunk.rope_theta": 1.0},
    "trunk.rope_theta must be more than 1 for yarn, got 1.0.",
  ),
  "odd part of a head": (
    {"trunk.rope_fraction": 0.1},
    "trunk.rope_fraction must be such that an even part of a head's 32 numbers turns "
    "(it is 3), got 0.1.",
  ),
  "no part of a head": (
    {"trunk.rope_fraction": 0.0}, "trunk.rope_fraction must be in (0, 1], got 0.0.",
  ),
  "only dense layers": (
    EXPERTS | {"trunk.moe.dense_layers": 4},
    "trunk.moe.dense_layers must be less than the layers of the trunk (4), got 4.",
  ),
  "groups": (
    EXPERTS | {"trunk.moe.num_groups": 3},
    "trunk.moe.num_experts must be divisible by trunk.moe.num_groups (3), got 8.",
  ),
  "groups of one": (
    EXPERTS | {"trunk.moe.num_groups": 8, "trunk.moe.groups_per_token": 2},
    "trunk.moe.num_groups must be such that a group has at least 2 experts: its score "
    "is the sum of the best two, got 8.",
  ),
  "groups per token": (
    EXPERTS | {"trunk.moe.num_groups": 2, "trunk.moe.groups_per_token": 3},
    "trunk.moe.groups_per_token must be at most trunk.moe.num_groups (2), got 3.",
  ),
  "experts per token": (
    EXPERTS | {"trunk.moe.num_groups": 4, "trunk.moe.experts_per_token": 3},
    "trunk.moe.experts_per_token must be at most the experts of groups_per_token "
    "groups (2), got 3.",
  ),
  "experts over devices": (
    EXPERTS | {"mesh.expert": 3},
    "trunk.moe.num_experts must be divisible by mesh.expert (3), got 8.",
  ),
  "no experts over devices": (
    {"mesh.expert": 2},
    "mesh.expert must be 1 unless trunk.moe.num_experts is positive (it is 0), got 2.",
  ),
  "dense blocks of a dense trunk": (
    {"mtp.kind": "sequential", "mtp.depth": 1, "mtp.dense_blocks": True},
    "mtp.dense_blocks must be False unless mtp.kind is 'sequential' and "
    "trunk.moe.num_experts is positive (they are 'sequential' and 0), got True.",
  ),
  "nothing but a frozen trunk": (
    {"train.freeze_trunk": True},
    "train.freeze_trunk must be False at mtp.depth 0: there would be nothing to train, "
    "got True.",
  ),
  "text is scored everywhere": (
    {"mtp.kind": "linear", "mtp.depth": 1, "mtp.score_from": "answer"},
    "mtp.score_from must be 'start' unless data.source is a task (it is 'stdlib'), got "
    "'answer'.",
  ),
  "nothing that could stop": (
    {"train.stop_metric": "loss", "train.stop_value": 1.0},
    "train.stop_metric must be '' without validations (train.eval_every and "
    "train.evals_per_doubling are 0), got 'loss'.",
  ),
  "no task to solve": (
    {
      "train.stop_metric": "task_accuracy", "train.stop_value": 0.95,
      "train.eval_every": 1,
    },
    "train.stop_metric must be '', 'loss' or 'bits_per_byte' unless data.source is a "
    "task and eval.task_examples is positive (they are 'stdlib' and 1024), got "
    "'task_accuracy'.",
  ),
  "no example to solve": (
    TASK | {"train.stop_metric": "task_accuracy", "eval.task_examples": 0},
    "train.stop_metric must be '', 'loss' or 'bits_per_byte' unless data.source is a "
    "task and eval.task_examples is positive (they are 'siblings' and 0), got "
    "'task_accuracy'.",
  ),
  "nothing new": (
    TASK | {"train.stop_metric": "task_new", "task.num_train": 0},
    "train.stop_metric must be another metric unless data.source is one of induction, "
    "siblings and task.num_train is positive (they are 'siblings' and 0), got "
    "'task_new'.",
  ),
  "more than all": (
    TASK | {"train.stop_metric": "task_accuracy", "train.stop_value": 95.0},
    "train.stop_value must be in (0, 1] for an accuracy, got 95.0.",
  ),
  "nothing to test": (
    {"train.eval_test": True, "train.eval_every": 1, "data.test_fraction": 0.0},
    "data.test_fraction must be positive: validations read it (train.eval_test), got "
    "0.0.",
  ),
  "text field": (
    {"data.source": "jsonl", "data.path": "x", "data.text_field": ""},
    "data.text_field must be set for data.source 'jsonl', got ''.",
  ),
  "other text for a task": (
    {
      "data.source": "siblings", "data.train_on": "a.jsonl",
      "tokenizer.kind": "symbols", "tokenizer.vocab_size": 5000,
    },
    "data.train_on must be '' unless data.source is one of 'stdlib', 'site_packages', "
    "'files', 'jsonl', 'parquet', 'hf', 'token_bin', 'array_record', 'mixture', "
    "'language_reference', 'stories' (it is 'siblings'), got 'a.jsonl'.",
  ),
  "nothing to train on": (
    {"data.validation_fraction": 0.6, "data.test_fraction": 0.4},
    "data.validation_fraction must be such that it and data.test_fraction (0.4) leave "
    "text to train on, got 0.6.",
  ),
  "nothing to evaluate": (
    {"eval.split": "test", "data.test_fraction": 0.0},
    "data.test_fraction must be positive: the evaluation reads it (eval.split 'test'), "
    "got 0.0.",
  ),
  "byte vocabulary": (
    {"tokenizer.vocab_size": 256},
    "tokenizer.vocab_size must be at least 258 for tokenizer.kind 'bytes', got 256.",
  ),
  "tokenizer file": (
    {"tokenizer.kind": "file"},
    "tokenizer.path must be set for tokenizer.kind 'file', got ''.",
  ),
  "no room for a prompt": (
    {"eval.max_new_tokens": 128},
    "eval.max_new_tokens must be less than data.seq_len (128), to leave room for a "
    "prompt, got 128.",
  ),
  "accumulation": (
    {"train.accumulation_steps": 3},
    "data.batch_size must be divisible by train.accumulation_steps (3), got 16.",
  ),
  "wsd": (
    {"optimizer.schedule": "wsd", "optimizer.warmup_fraction": 0.9},
    "optimizer.warmup_fraction must be such that it and optimizer.decay_fraction (0.2) "
    "fit into training, got 0.9.",
  ),
  "context": (
    {"mesh.context": 3},
    "data.seq_len must be divisible by mesh.context (3), got 128.",
  ),
  "tensor kv heads": (
    {"mesh.tensor": 4},
    "trunk.num_kv_heads must be divisible by mesh.tensor (4), got 2.",
  ),
  "tensor mlp": (
    {"mesh.tensor": 2, "trunk.mlp_dim": 353},
    "trunk.mlp_dim must be divisible by mesh.tensor (2), got 353.",
  ),
  "tensor vocabulary": (
    {"mesh.tensor": 2, "tokenizer.vocab_size": 263},
    "tokenizer.vocab_size must be divisible by mesh.tensor (2), got 263.",
  ),
  "fsdp": (
    {"mesh.fsdp": 3}, "trunk.embed_dim must be divisible by mesh.fsdp (3), got 128."
  ),
}


CUDNN = {"trunk.attention": "cudnn"}
PLATFORMS = {
  "cudnn on a CPU": (
    CUDNN, "cpu", "'auto', 'xla' or 'blocked' on platform 'cpu': cuDNN is of NVIDIA "
    "GPUs, got 'cudnn'.",
  ),
  "cudnn on a TPU": (
    CUDNN, "tpu", "'auto', 'xla' or 'blocked' on platform 'tpu': cuDNN is of NVIDIA "
    "GPUs, got 'cudnn'.",
  ),
  "cudnn in float32": (
    CUDNN | {"trunk.compute_dtype": "float32"}, "gpu",
    "another where attention is not in 16-bit floats, got 'cudnn'.",
  ),
  "cudnn of large heads": (
    CUDNN | {"trunk.attention_dim": 4 * 260}, "gpu",
    "another where attention has heads of 264, above 256, got 'cudnn'.",
  ),
  "cudnn of odd rows": (
    CUDNN | {"data.seq_len": 127}, "gpu",
    "another where attention has rows of odd length (data.seq_len), got 'cudnn'.",
  ),
  "cudnn of split rows": (
    CUDNN | {"mesh.context": 2}, "gpu",
    "another where attention splits the sequence (mesh.context), got 'cudnn'.",
  ),
  "cudnn of large values": (
    LATENT | CUDNN | {"trunk.latent.value_dim": 300}, "gpu",
    "another where attention has heads of 304, above 256, got 'cudnn'.",
  ),
  "tokamax that is not there": (
    {"trunk.attention": "tokamax"}, "cpu", "'auto', 'xla' or 'blocked' on platform "
    "'cpu' where the package tokamax is not installed, got 'tokamax'.",
  ),
  "tokamax on several devices": (
    {"trunk.attention": "tokamax"}, "gpu", "another on 8 devices, got 'tokamax'."
  ),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_kernel_that_the_platform_does_not_have_is_refused(monkeypatch, name):
  values, platform, message = PLATFORMS[name]
  is_missing = name == "tokamax that is not there"
  monkeypatch.setattr("importlib.util.find_spec", lambda _: None if is_missing else 1)
  config = make(**values)
  found = error_of(config, 1 if is_missing else 8, platform)
  assert found == f"trunk.attention must be {message}"
  config_rules.validate(config, 8)  # The sweep's own process has other devices.


def test_places_of_documents_need_a_gpu_and_a_jax_that_take_them(monkeypatch):
  config = make(**{"trunk.attention": "cudnn_packed"})
  monkeypatch.setattr("mtp_jax.machine_rules.takes_documents", lambda: True)
  config_rules.validate(config, 8, "gpu")
  monkeypatch.setattr("mtp_jax.machine_rules.takes_documents", lambda: False)
  assert error_of(config, 8, "gpu") == (
    "trunk.attention must be another before Hopper, and before JAX 0.12, which places "
    f"the keys of documents right (this is JAX {jax.__version__}), got 'cudnn_packed'."
  )


def test_kernels_are_accepted_where_they_run(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda _: "it")
  for sizes in ({}, {"trunk.embed_dim": 48}, {"trunk.latent.value_dim": 56} | LATENT):
    config_rules.validate(make(**CUDNN | sizes), 8, "gpu")
  config_rules.validate(make(trunk__attention="tokamax"), 1, "tpu")
  for attention in ("auto", "xla", "blocked"):
    for grouped_matmul in ("auto", "ragged", "blocked"):
      moe = EXPERTS | {"trunk.moe.grouped_matmul": grouped_matmul}
      config_rules.validate(make(trunk__attention=attention, **moe), 8, "cpu")


def test_float64_is_refused_where_jax_would_make_float32_of_it():
  double = make(trunk__compute_dtype="float64")
  assert error_of(double) == (
    "trunk.compute_dtype must be 'auto', 'float32' or 'bfloat16' unless the "
    "environment has JAX_ENABLE_X64=1: JAX makes float32 of it, got 'float64'."
  )
  jax.config.update("jax_enable_x64", True)
  try:
    config_rules.validate(double)
  finally:
    jax.config.update("jax_enable_x64", False)


# Values that nothing reads under the other values, by key; all else is the default.
IGNORED = {
  "data.path": ("my/text", {}),
  "data.text_field": ("body", {"data.source": "files", "data.path": "x"}),
  "tokenizer.path": ("tokenizer.json", {"tokenizer.kind": "bpe"}),
  "task.num_train": (10, {}),
  "task.sat.num_clauses": (
    3, {"data.source": "countdown", "tokenizer.kind": "symbols"}
  ),
  "eval.line_prompts": (1, {"data.source": "sat", "tokenizer.kind": "symbols"}),
  "eval.rows_per_document": (1, {"data.source": "sat", "tokenizer.kind": "symbols"}),
  "eval.task_examples": (10, {}),
  "optimizer.decay_fraction": (0.5, {}),
  "trunk.latent.kv_rank": (64, {}),
  "trunk.moe.expert_dim": (64, {}),
  "trunk.moe.grouped_matmul": ("ragged", {}),
  "trunk.moe.bias_until": (0.5, EXPERTS | {"trunk.moe.bias_rate": 0.0}),
  "trunk.rope_theta": (1e6, {"trunk.kind": "gpt2", "trunk.num_kv_heads": 4}),
  "trunk.rope_fraction": (0.5, LATENT),
  "trunk.rope_scaling.factor": (4.0, {}),
  "trunk.rope_scaling.original_length": (64, {"trunk.rope_scaling.kind": "linear"}),
  "trunk.rope_scaling.high_freq_factor": (5.0, {"trunk.rope_scaling.kind": "yarn"}),
  "trunk.rope_scaling.beta_fast": (40.0, {"trunk.rope_scaling.kind": "llama3"}),
  "mtp.final_weight": (0.5, {"mtp.kind": "sequential", "mtp.depth": 1}),
  "mtp.share_modules": (True, {"mtp.kind": "sequential", "mtp.depth": 1}),
  "mtp.hidden": ("trunk_shifted", {"mtp.kind": "sequential", "mtp.depth": 1}),
  "mtp.hidden_norm": ("before", {"mtp.kind": "sequential"}),
  "mtp.fed": ("own", {"mtp.kind": "sequential"}),
  "mtp.out_norm": ("none", {"mtp.kind": "sequential"}),
  "mtp.norm": ("rms", {"mtp.kind": "sequential"}),
  "mtp.markov_rank": (8, {"mtp.kind": "linear", "mtp.depth": 1}),
  "mtp.dense_blocks": (True, EXPERTS | {"mtp.kind": "sequential"}),
  "train.eval_test": (True, {}),
  "data.validation_fraction": (0.1, QUIET),
  "data.test_fraction": (0.1, QUIET | {"data.source": "induction"}),
  "mtp.schedule_fraction": (
    0.5, {"mtp.kind": "linear", "mtp.depth": 1, "mtp.schedule": "linear"}
  ),
}


@pytest.mark.parametrize("key", IGNORED)
def test_a_value_that_nothing_reads_is_refused(key):
  value, others = IGNORED[key]
  default = KEYS[key].default
  message = error_of(make(**others | {key: value}))
  assert re.fullmatch(
    rf"{re.escape(f'{key} must be {default!r} unless ')}.*, got {value!r}\.", message
  )


FLOPS = {"mtp.kind": "sequential", "mtp.depth": 2, "mtp.arm": "flops"}
NO_PROMPTS = {
  "mtp.kind": "sequential", "mtp.depth": 2, "eval.line_prompts": 0,
  "eval.function_prompts": 0,
}
# Values that a trial of a sweep may have for the sake of the others, and what else the
# trial has; a lone run may not.
IGNORED_IF_GIVEN = {
  "schedule without depths": ("mtp.schedule", "anneal", {"mtp.kind": "linear"}),
  "curriculum without depths": ("mtp.curriculum", "reverse", {}),
  "weighting of one depth": (
    "mtp.weighting", "sum", {"mtp.kind": "linear", "mtp.depth": 1}
  ),
  "scored depths without depths": (
    "mtp.score_from", "answer", QUIET
  ),
  "diagnostics without depths": ("train.diagnostics_every", 50, {}),
  "middles without depths": ("eval.middle_prompts", 4, {}),
  "weight of longer NTP": ("mtp.weight", 0.5, FLOPS),
  "weighting of longer NTP": ("mtp.weighting", "sum", FLOPS),
  "depth weights of longer NTP": ("mtp.depth_weights", (1.0, 0.5), FLOPS),
  "schedule of longer NTP": ("mtp.schedule", "anneal", FLOPS),
  "curriculum of longer NTP": ("mtp.curriculum", "forward", FLOPS),
  "hidden of longer NTP": ("mtp.hidden", "trunk", FLOPS),
  "norm of a trunk that has it": (
    "mtp.norm", "rms", {"mtp.kind": "sequential", "mtp.depth": 2}
  ),
  "norm of longer NTP": ("mtp.norm", "rms", FLOPS),
  "output norm of longer NTP": ("mtp.out_norm", "none", FLOPS),
  "feature weight of longer NTP": ("mtp.feature_weight", 0.1, FLOPS),
  "drafts of longer NTP": ("eval.num_drafts", 1, FLOPS),
  "diagnostics of longer NTP": ("train.diagnostics_every", 50, FLOPS),
  "length of no completion": ("eval.max_new_tokens", 9, NO_PROMPTS),
  "drafts of no completion": ("eval.num_drafts", 1, NO_PROMPTS),
  "drafts of no answer": (
    "eval.num_drafts", 1,
    QUIET | FLOPS | {"mtp.arm": "added", "eval.task_examples": 0},
  ),
}


@pytest.mark.parametrize("name", IGNORED_IF_GIVEN)
def test_a_value_that_nothing_reads_is_refused_where_it_is_given(name):
  key, value, others = IGNORED_IF_GIVEN[name]
  config = make(**others | {key: value})
  config_rules.validate(config)
  with pytest.raises(ConfigError) as caught:
    config_rules.validate(config, given=[key])
  assert str(caught.value).startswith(f"{key} must be {KEYS[key].default!r} unless ")
  assert effects.settled(config) == effects.settled(make(**others))
  assert effects.essential(config) == effects.essential(make(**others))


TASK_OF = {
  f"task.{x}.": {"data.source": x, "tokenizer.kind": "symbols"}
  for x in config_lib.TASKS
}
# Counts that are reached or not: nothing is made of their size.
UNBOUNDED = {
  "train.num_steps", "train.log_every", "train.eval_every", "train.evals_per_doubling",
  "train.diagnostics_every", "train.max_nonfinite_steps", "checkpoint.every_steps",
  "checkpoint.keep", "optimizer.base_width", "loss.block_tokens", "eval.num_rows",
  "eval.rows_per_document", "eval.line_prompts", "eval.function_prompts",
  "eval.middle_prompts", "trunk.rope_scaling.original_length",
  "task.countdown.largest",
}


@pytest.mark.parametrize("key", [
  key for key, facts in KEYS.items()
  if type(facts.default) is int and not key.endswith("seed")
])
def test_absurd_sizes_are_refused_before_anything_is_made(monkeypatch, key):
  monkeypatch.setattr(machine_rules, "machine_memory", lambda: 10**11)
  others = next((x for name, x in TASK_OF.items() if key.startswith(name)), {})
  if key.startswith("trunk.latent"):
    others = LATENT
  if key.startswith("trunk.moe"):
    others = EXPERTS
  if key.startswith("trunk.rope_scaling"):
    others = {"trunk.rope_scaling.kind": "yarn"}
  if key == "mtp.draft_vocab":
    others = {"mtp.kind": "eagle3", "mtp.depth": 1, "mtp.unembed": "own"}
  if key == "mtp.markov_rank":
    others = {"mtp.kind": "parallel", "mtp.depth": 1}
  if key == "eval.task_examples" or key == "task.num_train":
    others = QUIET
  config = make(**others | {key: 2_000_000_000})
  if key in UNBOUNDED:
    config_rules.validate(config, 1, "cpu")
  elif key == "task.num_train":  # 64 GB at least.
    config_rules.validate(config, 1, "cpu")
    monkeypatch.setattr(machine_rules, "machine_memory", lambda: 60 * 10**9)
    assert "fits into memory" in error_of(config)
  else:
    assert error_of(config, 1, "cpu")


def test_a_batch_that_no_memory_holds_is_refused_with_what_it_takes(monkeypatch):
  monkeypatch.setattr(machine_rules, "machine_memory", lambda: 16 * 10**9)
  assert error_of(make(data__batch_size=2_000_000_000)) == (
    "data.batch_size must be such that it fits into memory: a row of 128 tokens takes "
    "at least 1,536 bytes, and there are 16.0 GB, got 2000000000."
  )
  deep = make(trunk__num_layers=2_000_000_000)
  for platform, most in (("cpu", "16"), ("gpu", "1,100")):
    assert re.fullmatch(
      r"trunk\.num_layers must be such that the parameters fit into memory: they take "
      rf"at least [\d,]+ GB, and 8 device\(s\) have at most {most} GB each, got "
      r"2000000000\.",
      error_of(deep, 8, platform),
    )
  config_rules.validate(deep, 8)  # For devices of another machine.


def test_a_kind_without_depths_is_refused_where_it_is_given():
  for kind in ("sequential", "linear", "medusa"):
    with pytest.raises(ConfigError) as caught:
      config_rules.validate(make(mtp__kind=kind), given=["mtp.kind"])
    assert str(caught.value) == (
      f"mtp.kind must be 'none' unless mtp.depth is positive (it is 0), got {kind!r}."
    )
  # The head of the next token is a layer of its own.
  config_rules.validate(make(mtp__kind="parallel"), given=["mtp.kind"])


def test_the_width_of_dense_layers_is_refused_where_no_layer_is_dense():
  values = EXPERTS | {"trunk.moe.dense_layers": 0, "trunk.mlp_dim": 64}
  with pytest.raises(ConfigError) as caught:
    config_rules.validate(make(**values), given=["trunk.mlp_dim"])
  assert str(caught.value) == (
    "trunk.mlp_dim must be 352 where every layer has experts (trunk.moe.dense_layers "
    "is 0), got 64."
  )
  for more in (
    {"trunk.moe.dense_layers": 1}, {"mtp.kind": "eagle", "mtp.depth": 1},
    {"mtp.kind": "sequential", "mtp.depth": 1, "mtp.dense_blocks": True},
  ):
    config_rules.validate(make(**values | more), given=["trunk.mlp_dim"])


def test_every_condition_of_an_effect_is_of_known_keys_and_choices():
  for facts in KEYS.values():
    for conditions in (facts.when, facts.then, facts.when_given):
      for names, allowed in conditions.items():
        for name in [names] if isinstance(names, str) else names:
          assert name in KEYS
          for value in () if isinstance(allowed, Range) else allowed:
            make(**{name: value})  # Raises for a value that is no choice.


def test_the_baseline_of_a_sweep_may_have_the_weight_of_the_others():
  baseline = make(mtp__weight=1.0, mtp__weighting="sum", eval__middle_prompts=4)
  config_rules.validate(baseline)
  for kind in ("none", "linear"):
    with pytest.raises(ConfigError) as caught:
      config_rules.validate(make(mtp__weight=1.0, mtp__kind=kind), given=["mtp.weight"])
    assert str(caught.value) == (
      "mtp.weight must be 0.3 unless mtp.depth is positive (it is 0), got 1.0."
    )
  trained = make(mtp__weight=1.0, mtp__kind="linear", mtp__depth=1)
  config_rules.validate(trained, given=["mtp.weight"])


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
  overrides, message = RULES[name]
  assert error_of(make(**overrides)) == message


DEVICE_RULES = {
  "fixed axes": (
    {"mesh.fsdp": 4},
    "mesh must be such that fsdp * expert * tensor * context divides the number of "
    "devices (6), got {'data': -1, 'fsdp': 4, 'expert': 1, 'tensor': 1, 'context': 1}.",
  ),
  "all axes": (
    {"mesh.data": 4},
    "mesh must be such that data * fsdp * expert * tensor * context equals the number "
    "of devices (6), got {'data': 4, 'fsdp': 1, 'expert': 1, 'tensor': 1, 'context': "
    "1}.",
  ),
  "microbatch": (
    {"train.accumulation_steps": 2, "eval.batch_size": 36},
    "data.batch_size must be such that a microbatch (8 rows) divides over mesh data * "
    "fsdp * expert (6), got 16.",
  ),
  "evaluation batch": (
    {"data.batch_size": 12},
    "eval.batch_size must be divisible by mesh data * fsdp * expert (6), got 32.",
  ),
}


@pytest.mark.parametrize("name", DEVICE_RULES)
def test_rules_of_devices(name):
  overrides, message = DEVICE_RULES[name]
  config = make(**overrides)
  config_rules.validate(config)
  assert error_of(config, num_devices=6) == message


def test_all_broken_rules_are_named_at_once():
  lines = error_of(make(mtp__weight=-1.0, mtp__depth=-1, data__seq_len=0)).splitlines()
  assert [re.match(r"[\w.]+", line)[0] for line in lines] == [
    "data.seq_len", "mtp.depth", "mtp.weight"
  ]


def test_equal_programs_have_no_key_of_the_host():
  config = make(mtp__kind="linear", mtp__depth=2)
  values = {
    key: 7 if type(facts.default) is int else 0.5
    for key, facts in KEYS.items()
    if HOST in facts.role and type(facts.default) in (int, float)
  }
  other = config_lib.with_overrides(config, values)
  found = program.program_config(other)
  assert found == program.program_config(config)
  assert hash(found) == hash(program.program_config(config))
  assert pickle.loads(pickle.dumps(found)) == found
  assert program.program_config(make()) != found
  for read in (
    lambda: found.seed, lambda: found.data.source, lambda: found.mtp.weight,
    lambda: found.eval, lambda: found.task,
  ):
    with pytest.raises(AttributeError):
      read()


def test_programs_of_the_baseline_do_not_depend_on_what_weighs_depths():
  plain, swept = make(), make(mtp__weighting="sum", mtp__schedule="anneal")
  assert program.program_config(plain) == program.program_config(swept)
  assert effects.essential(plain) == effects.essential(swept)


def test_next_token_prediction_is_the_section_without_depths():
  for mtp in (make(mtp__kind="linear", mtp__depth=2, mtp__objective="kl").mtp,
              program.program_config(make(mtp__kind="linear", mtp__depth=2)).mtp):
    found = config_lib.next_token_only(mtp)
    assert type(found) is type(mtp) and (found.kind, found.depth) == ("none", 0)
  assert config_lib.next_token_only(make(mtp__weight=9.0).mtp) == make().mtp


def test_json_and_back():
  config = make(mtp__kind="linear", mtp__depth=2, mtp__depth_weights=(1.0, 0.5))
  text = json.dumps(config_lib.to_dict(config))
  assert config_lib.from_config_dict(json.loads(text)) == config


def test_difference_names_dotted_keys():
  found = config_lib.difference(make(), make(mtp__weight=0.5, seed=3))
  assert found == {"seed": (0, 3), "mtp.weight": (0.3, 0.5)}


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().seed = 1


@pytest.mark.parametrize("key, name", [
  ("seed", "int"), ("trunk", "section"), ("mtp.weight", "float"), ("mtp.kind", "str"),
  ("mtp.depth_weights", "sequence of float"),
])
def test_type_name(key, name):
  assert config_lib.type_name(key) == name


def test_dotted_keys_hold_sections_and_values():
  keys = config_lib.dotted_keys()
  assert {"seed", "mtp", "mtp.depth", "eval.max_new_tokens"} <= set(keys)
  assert len(keys) == len(set(keys))


def test_layers_of_the_trunk_by_kind_and_arm():
  def layers(**mtp):
    return predictors.num_trunk_layers(make(trunk__num_layers=8, **mtp))

  assert layers() == 8
  assert layers(mtp__kind="sequential", mtp__depth=2) == 8
  assert layers(mtp__kind="sequential", mtp__depth=2, mtp__arm="shortened") == 6
  assert layers(
    mtp__kind="sequential", mtp__depth=2, mtp__arm="shortened", mtp__share_modules=True
  ) == 7
  assert layers(mtp__kind="parallel", mtp__depth=2) == 7
  assert layers(mtp__kind="parallel", mtp__depth=2, mtp__arm="shortened") == 5
  assert layers(mtp__kind="linear", mtp__depth=2) == 8
