r"""Finds the tree of drafts that a run's predictors are expected to gain most with.

  mtp-jax tree --workdir=runs/medusa3 --nodes=16
  mtp-jax generate --workdir=RUN --prompt="def " --tree=RUN/tree.json

On held-out rows it is counted how often the token that a predictor ranks r-th is the
trunk's own choice; the nodes with the largest products of these shares along their path
make the tree (Cai et al. 2024, arXiv 2401.10774, section 2.3.3). Where a draft depends
on the one before it, only the most likely drafts have children.

The tree is written to tree.json in the run folder (docs/how-to/decoding.md).
More nodes are never expected to bring fewer tokens, but every one has its cost:
`mtp-jax bench decode --runs=RUN --trees=own` measures it.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from launch import cli
from mtp_jax import evaluate, run_folder
from mtp_jax.config import ConfigError
from mtp_jax.data.pipeline import load_corpus
from mtp_jax.decode import drafters, trees
from mtp_jax.environment import code_commit
from mtp_jax.files import write_json
from mtp_jax.predictors import num_drafts
from mtp_jax.program import program_config
from mtp_jax.trained_model import TrainedModel

_WORKDIR = cli.define_workdir("run folder")
_NODES = flags.DEFINE_integer(
  "nodes", 16, "of the tree: tokens verified per round besides the newest one",
  lower_bound=1, upper_bound=trees.MOST_NODES,
)
_RANKS = flags.DEFINE_integer(
  "ranks", 10, "most likely tokens of a predictor that may be nodes", lower_bound=1
)
_SPLIT = flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "which held-out documents"
)
_STEP = cli.define_step()
_COMPILATION_CACHE = cli.define_compilation_cache()


def main() -> int:
  workdir = Path(_WORKDIR.value)
  cli.load_run_config(workdir)  # Refuses other folders: tree.json belongs to a run.
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  model = cli.load_model(_WORKDIR.value, _STEP.value)
  if not num_drafts(model.config.mtp):
    raise ConfigError(f"{workdir}: the model has no extra predictors that draft.")
  with cli.as_bad_input():
    found = _measure(model)
  command = ["python", "-m", "launch.tree", *sys.argv[1:]]
  found |= {"command": shlex.join(command), "commit": code_commit()}
  path = workdir / run_folder.TREE
  write_json(path, found)
  print(_table(found))
  print(
    f"expected tokens per round: {found['expected_tokens']:.3f} with {_NODES.value} "
    f"nodes, {found['expected_tokens_of_chain']:.3f} with a chain of "
    f"{model.config.mtp.depth}"
  )
  print(f"written to {path}")
  return 0


def _measure(model: TrainedModel) -> dict[str, Any]:
  """Returns tree.json, but for the command and the commit."""
  limits = dataclasses.replace(model.config.eval, split=_SPLIT.value)
  config = dataclasses.replace(model.config, eval=limits)
  depth, feeds = config.mtp.depth, drafters.own_predictors(config).feeds_choices
  corpus = load_corpus(config, model.tokenizer)
  with jax.set_mesh(model.mesh):
    hits_KR, num_positions = evaluate.top_k_hits(
      program_config(config), model.params, corpus.eval_batches(1 + depth),
      _RANKS.value, model.mesh,
    )
  tree = trees.best_static_tree(hits_KR, _NODES.value, spine_only=feeds)
  return {
    "paths": tree.paths,
    "hits": hits_KR,
    "expected_tokens": trees.expected_tokens(tree, hits_KR),
    "expected_tokens_of_chain": 1 + float(np.sum(np.cumprod(hits_KR[:, 0]))),
    "num_positions": num_positions,
    "split": _SPLIT.value,
    "step": model.step,
  }


def _table(found: dict[str, Any]) -> str:
  """Returns the hits and the number of nodes of every depth."""
  rows = [
    (f"draft {k}", *(f"{hit:.3f}" for hit in hits_R),
     str(sum(len(path) == k for path in found["paths"])))
    for k, hits_R in enumerate(found["hits"], start=1)
  ]
  ranks = (f"rank {r}" for r in range(_RANKS.value))
  return cli.table(("", *ranks, "nodes"), rows)


if __name__ == "__main__":
  cli.run(main)
