"""Runs of a few steps on a few texts, for the tests of the training loop."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments import base
from mtp_jax import config as config_lib
from mtp_jax.config import Config

WORDS = ("total", "index", "value", "left", "right", "data", "x", "y")
WALL_CLOCK = ("seconds", "train_seconds", "tokens_per_second", "mfu")


def write_texts(folder: Path, count: int = 24) -> Path:
  """Writes small Python files, each with a function of several lines."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    names = rng.choice(WORDS, 12)
    lines = [f"def f{i}({names[0]}):"]
    lines += [f"  {a} = {b} + {i}" for a, b in itertools.pairwise(names)]
    lines += [f"  return {names[-1]}", ""]
    (folder / f"{i}.py").write_text("\n".join(lines))
  return folder


def run_config(texts: Path, overrides: dict[str, Any] | None = None) -> Config:
  """Returns a config that trains for 12 steps, over an epoch, in about a second."""
  values = {
    "name": "tiny",
    "trunk.num_layers": 2,
    "trunk.embed_dim": 16,
    "trunk.mlp_dim": 24,
    "mtp.kind": "sequential",
    "mtp.depth": 2,
    "loss.block_tokens": 100,
    "data.source": "files",
    "data.path": str(texts),
    "data.seq_len": 64,
    "data.batch_size": 8,
    "data.validation_fraction": 0.3,
    "data.test_fraction": 0.1,
    "train.num_steps": 12,
    "train.log_every": 3,
    "train.eval_every": 6,
    "train.diagnostics_every": 6,
    "checkpoint.every_steps": 4,
    "eval.num_rows": 10,
    "eval.rows_per_document": 2,
    "eval.batch_size": 8,
    "eval.line_prompts": 2,
    "eval.function_prompts": 2,
    "eval.max_new_tokens": 24,
  }
  values |= overrides or {}
  if values["data.source"] in ("siblings", "induction"):  # They split without these.
    values = {key: x for key, x in values.items() if not key.endswith("_fraction")}
  default = config_lib.from_config_dict(base.get_config())
  return config_lib.with_overrides(default, values)


def read_metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl, or those of one kind."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [x for x in records if kind in (None, x["kind"])]


def without_wall_clock(record: dict[str, Any]) -> dict[str, Any]:
  """Returns what two equal runs must agree on."""
  return {key: value for key, value in record.items() if key not in WALL_CLOCK}
