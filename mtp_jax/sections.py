"""The sections of a config: one line has all facts of a key.

A line holds the key's type, default, meaning, range, role and where it has an effect;
see `keys.py` for the words.
"""

import dataclasses
import typing
from typing import Literal

from mtp_jax.keys import (
  ABOVE_0,
  ARCH,
  BELOW_1,
  FRACTION,
  HOST,
  MEASURE,
  NOT_NEGATIVE,
  ON,
  REPEATS,
  REST_OR_1,
  RUNS,
  SCALES,
  SEED,
  UNCOMPARED,
  WATCH,
  at_least,
  at_most,
  key,
  section,
)
from mtp_jax.model_sections import MtpConfig, TrunkConfig

_Source = Literal[
  "stdlib", "site_packages", "files", "jsonl", "parquet", "hf", "token_bin",
  "array_record", "mixture", "language_reference", "stories", "star_graph", "sat",
  "countdown", "polynomial", "induction", "siblings",
]
# Values of `data.source` that are generated, and need `tokenizer.kind` "symbols".
TASKS = ("star_graph", "sat", "countdown", "polynomial", "induction", "siblings")
TEXTS = tuple(x for x in typing.get_args(_Source) if x not in TASKS)
# Of these, the tasks whose answers can be new, see `evaluate.task_metrics`.
TASKS_WITH_NEW = ("induction", "siblings")
# Most variables of formulas whose assignments are all tried.
SAT_TABLE_VARIABLES = 10
# Drafts of a round; every one is a part of the program, which is compiled for minutes.
MOST_DRAFTS = 64


# Where keys have an effect: values that other keys must have.
_EXPERTS = {"trunk.moe.num_experts": ON}
_MTP = {"mtp.depth": ON, "mtp.arm": ("added", "shortened")}
_TEXT, _TASK = {"data.source": TEXTS}, {"data.source": TASKS}
# Tasks whose answers can be new hold out parts of answers, not documents by their hash.
_SPLIT = {
  "data.source": tuple(
    x for x in typing.get_args(_Source) if x not in TASKS_WITH_NEW
  )
}
# An example fits into a row, and every name is a token.
_ROW, _NAMES = "data.seq_len", "tokenizer.vocab_size"
_PROMPTS = "eval.line_prompts", "eval.function_prompts", "eval.middle_prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """`block_tokens`: positions whose logits are alive at once, per device.

  0: 1024 on a CPU; elsewhere as many as have 1 GiB of logits.
  """

  block_tokens: int = key(0, "positions whose logits are alive", RUNS, at_least(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """bytes | bpe (trained on the corpus) | file (a Hugging Face tokenizer.json) |
  symbols (the words of a task).

  `vocab_size` is the size of the embedding: at least what the tokenizer needs.
  """

  kind: Literal["bytes", "bpe", "file", "symbols"] = key(
    "bytes", "what a token is", ARCH | HOST
  )
  vocab_size: int = key(264, "of the embedding", ARCH, at_least(1), by="mesh.tensor")
  path: str = key("", "tokenizer.json", MEASURE, when={"tokenizer.kind": ("file",)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where text comes from and how it becomes rows.

  source:     stdlib | site_packages (sources of the installed packages) | files
              (`path`: folder or glob) | jsonl (`path`: file or glob, plain, .gz or
              .zst) | parquet (`path`: file or glob) | hf (`path`: a dataset of the
              Hugging Face Hub or a local folder, NAME[:CONFIGURATION[:SPLIT]]) |
              token_bin (`path`: file or glob of token shards as llm.c and nanoGPT write
              them) | array_record (`path`: folder written by launch.prepare) |
              mixture (`path`: WEIGHT SOURCE PATH; ..., see data/mixture.py) |
              language_reference, stories (see data/generated.py) | one of `TASKS`,
              generated (section `task`).
  train_on:   "" trains on the source's train split; else on the texts of this JSONL
              file, as launch.write_corpus writes it. What is evaluated, and what a BPE
              tokenizer learns from, is of the source all the same.
  batch_size: sequences per optimizer step, over all devices and microbatches.
  seed:       order of documents and rows; independent of the model's seed.
  """

  source: _Source = key("stdlib", "where text comes from", HOST)
  path: str = key(
    "", "file, folder or glob", MEASURE,
    when={
      "data.source": (
        "files", "jsonl", "parquet", "hf", "token_bin", "array_record", "mixture"
      )
    },
  )
  text_field: str = key(
    "text", "key or column of the text", HOST,
    when={"data.source": ("jsonl", "parquet", "hf", "mixture")},
  )
  train_on: str = key("", "JSONL file to train on instead", MEASURE, when=_TEXT)
  seq_len: int = key(128, "tokens of a row", at_least(1), by="mesh.context")
  batch_size: int = key(
    16, "rows of an optimizer step", SCALES, at_least(1), by="train.accumulation_steps"
  )
  seed: int = key(0, "order of documents and rows", REPEATS, SEED)
  validation_fraction: float = key(0.05, "of documents", HOST, FRACTION, when=_SPLIT)
  test_fraction: float = key(0.05, "of documents", HOST, FRACTION, when=_SPLIT)
  num_workers: int = key(0, "processes that read rows", WATCH, at_least(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarGraphConfig:
  """G(`arms`, `length`) with nodes named by some of `num_labels` names."""

  arms: int = key(3, "paths from the source", HOST, at_least(1), most=_ROW)
  length: int = key(3, "nodes of an arm, ends too", HOST, at_least(2), most=_ROW)
  num_labels: int = key(30, "names of nodes", HOST, most=_NAMES)
  reversed: bool = key(False, "the answer runs from goal to source", HOST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatConfig:
  """Formulas; `unique` for at most `SAT_TABLE_VARIABLES` variables."""

  num_variables: int = key(7, "variables of a formula", HOST, at_least(3), most=_ROW)
  num_clauses: int = key(30, "clauses of a formula", HOST, at_least(1), most=_ROW)
  unique: bool = key(False, "exactly one assignment satisfies a formula", HOST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig:
  """Equations that reach a target from some inputs."""

  num_inputs: int = key(4, "numbers to use", HOST, at_least(2), most=_ROW)
  largest: int = key(100, "number, target and results included", HOST, at_least(10))
  num_pauses: int = key(8, "pauses before the answer", HOST, at_least(0), most=_ROW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolynomialConfig:
  """Expressions over a finite field."""

  max_operators: int = key(5, "operators in training", HOST, at_least(1), most=_ROW)
  held_out_operators: int = key(7, "operators held out", HOST, at_least(1), most=_ROW)
  num_pauses: int = key(0, "pauses before the answer", HOST, at_least(0), most=_ROW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionConfig:
  """A name is one of `num_halves` words, then one of as many others.

  fresh_share: share of training stories whose names are drawn from all pairs, alike,
    but for a tenth of those that are not among the `num_names`, which stays held out;
    0: all pairs that are not among the `num_names` are held out.
  """

  num_sentences: int = key(10, "sentences of a story", HOST, at_least(3), most=_ROW)
  num_halves: int = key(50, "first and second names", HOST, most=_NAMES)
  num_names: int = key(500, "pairs that occur in training", HOST, at_least(1))
  fresh_share: float = key(0.0, "stories with names of any pair", HOST, FRACTION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiblingsConfig:
  """Two children of one parent after a prefix without information."""

  num_parents: int = key(5, "parents", HOST, at_least(1), most=_NAMES)
  num_children: int = key(500, "children of a parent", HOST, at_least(2), most=_NAMES)
  prefix_length: int = key(10, "tokens before the answer", HOST, at_least(0), most=_ROW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """Sizes of the synthetic tasks (`data.source`); see data/tasks."""

  num_train: int = key(0, "training examples; 0: never repeated", HOST, at_least(0))
  star_graph: StarGraphConfig = section({"data.source": ("star_graph",)})
  sat: SatConfig = section({"data.source": ("sat",)})
  countdown: CountdownConfig = section({"data.source": ("countdown",)})
  polynomial: PolynomialConfig = section({"data.source": ("polynomial",)})
  induction: InductionConfig = section({"data.source": ("induction",)})
  siblings: SiblingsConfig = section({"data.source": ("siblings",)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """`learning_rate` is the peak for width `base_width`; see optimizer.py."""

  kind: Literal["adamw", "muon"] = key("adamw", "rule of the matrices", ARCH)
  learning_rate: float = key(3e-3, "peak", REPEATS, ABOVE_0)
  base_width: int = key(128, "width that the peak is for", SCALES, at_least(1))
  schedule: Literal["cosine", "wsd"] = key("cosine", "rate over training")
  warmup_fraction: float = key(0.05, "share of steps, linear", SCALES, FRACTION)
  decay_fraction: float = key(
    0.2, "share of steps, linear", SCALES, FRACTION,
    when={"optimizer.schedule": ("wsd",)},
  )
  final_fraction: float = key(0.03, "last rate, relative to the peak", SCALES, FRACTION)
  weight_decay: float = key(0.1, "of matrices", SCALES, NOT_NEGATIVE)
  beta1: float = key(0.9, "memory of the mean", SCALES, BELOW_1)
  beta2: float = key(0.95, "memory of the square", SCALES, BELOW_1)
  eps: float = key(1e-8, "added to the root of the square", SCALES, ABOVE_0)
  clip_norm: float = key(1.0, "largest norm of a gradient", SCALES, ABOVE_0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long to train, what, and how often to look.

  evals_per_doubling: validations for each doubling of the step, k of them after the
    steps round(2^(j / k)), each once; 0 = off. Both kinds may be on, and where one is,
    the last step is validated too.
  eval_test: each validation also measures the test split, in a record of its own, and
    validation records are of the validation split whatever `eval.split` is.
  stop_metric, stop_value: training ends when this field of validation records (`loss`
    is depth 0's) has reached the value twice in a row, accuracies from below and
    losses from above; empty trains for all steps.
  freeze_trunk: only the extra predictors (`mtp` in the parameter tree) learn; the rest
    stays as it is, bit for bit.
  trunk_from: folder of the run whose newest deployed model (all but the extra
    predictors) a new run begins with; empty begins at random.
  start_from: the same, with the extra predictors: a new run, from step 0 and with a new
    optimizer state, on from all parameters of that one.
  """

  num_steps: int = key(500, "optimizer steps", HOST | SCALES, at_least(1))
  accumulation_steps: int = key(1, "microbatches of a step", UNCOMPARED, at_least(1))
  log_every: int = key(20, "steps between records", WATCH, at_least(1))
  eval_every: int = key(0, "steps between validations; 0: off", WATCH, at_least(0))
  evals_per_doubling: int = key(0, "validations; 0: off", WATCH, at_least(0))
  eval_test: bool = key(
    False, "validations measure the test split too", WATCH,
    when={("train.eval_every", "train.evals_per_doubling"): ON},
  )
  stop_metric: Literal["", "task_accuracy", "task_new", "loss", "bits_per_byte"] = key(
    "", "field of validation records that ends training", HOST
  )
  stop_value: float = key(
    0.0, "value that ends training", HOST, NOT_NEGATIVE,
    when={
      "train.stop_metric": ("task_accuracy", "task_new", "loss", "bits_per_byte")
    },
  )
  diagnostics_every: int = key(
    100, "steps between comparisons of MTP and NTP gradient; 0: off", WATCH,
    at_least(0), when_given=_MTP,
  )
  max_nonfinite_steps: int = key(10, "in a row, before failing", WATCH, at_least(1))
  freeze_trunk: bool = key(False, "only the extra predictors learn")
  trunk_from: str = key("", "run folder whose trunk to begin with", MEASURE)
  start_from: str = key("", "run folder whose model to begin with", MEASURE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis.

  `expert` splits the experts, and the rows of a batch like `data` does.
  """

  data: int = key(-1, "splits rows; -1: all devices that are left", RUNS, REST_OR_1)
  fsdp: int = key(1, "splits parameters and rows", RUNS, at_least(1))
  expert: int = key(1, "splits experts and rows", RUNS, at_least(1), when=_EXPERTS)
  tensor: int = key(1, "splits heads and widths", RUNS, at_least(1))
  context: int = key(1, "splits rows into parts", RUNS, at_least(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When the state is saved."""

  every_steps: int = key(250, "steps between checkpoints", WATCH, at_least(1))
  keep: int = key(2, "newest checkpoints", WATCH, at_least(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """What the final evaluation measures.

  line_prompts, function_prompts: held-out prompts of the generative metrics; 0 = off.
  middle_prompts: held-out documents, of any text, that are continued from their middle
    by sampling, to measure how often drafts are accepted; 0: functions are continued
    instead.
  num_drafts: 0 is one per extra depth; for more, sequential modules read their own
    output.
  """

  split: Literal["validation", "test"] = key("validation", "documents", MEASURE)
  num_rows: int = key(256, "rows of `seq_len` tokens", MEASURE, at_least(1))
  rows_per_document: int = key(4, "at most", MEASURE, at_least(1), when=_TEXT)
  batch_size: int = key(32, "rows or prompts at a time", WATCH, at_least(1))
  line_prompts: int = key(64, "lines to complete", MEASURE, at_least(0), when=_TEXT)
  function_prompts: int = key(32, "functions to end", MEASURE, at_least(0), when=_TEXT)
  middle_prompts: int = key(
    0, "documents to continue by sampling", MEASURE, at_least(0), when=_TEXT,
    when_given=_MTP,
  )
  both_proposals: bool = key(
    False, "sample with drafts that are drawn, and with the most likely tokens",
    MEASURE, when={"eval.middle_prompts": ON}, when_given=_MTP,
  )
  max_new_tokens: int = key(
    64, "longest completion", MEASURE, at_least(1), when=_TEXT,
    when_given={_PROMPTS: ON},
  )
  num_drafts: int = key(
    0, "drafts of a round; 0: one per extra depth", MEASURE, at_least(0),
    at_most(MOST_DRAFTS), when_given=_MTP | {(*_PROMPTS, "eval.task_examples"): ON},
  )
  task_examples: int = key(1024, "tasks to solve", MEASURE, at_least(0), when=_TASK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  name: str = key("base", "name of the run", WATCH)
  seed: int = key(0, "of the parameters", REPEATS, SEED)
  trunk: TrunkConfig
  mtp: MtpConfig
  loss: LossConfig
  tokenizer: TokenizerConfig
  data: DataConfig
  task: TaskConfig = section(_TASK)
  optimizer: OptimizerConfig
  train: TrainConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  eval: EvalConfig
