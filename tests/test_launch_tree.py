"""The command that finds a tree of drafts, and decoding with what it found."""

import json

import numpy as np
import pytest

from mtp_jax.decode import trees
from tests import tiny_runs
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns the flags of two runs, one of independent heads and one of a chain."""
  folder = tmp_path_factory.mktemp("tree")
  texts = tiny_runs.write_texts(folder / "texts")
  found = {}
  for kind in ("medusa", "sequential", "none"):
    shape = {
      "trunk.num_layers": 1, "trunk.embed_dim": 8, "mtp.kind": kind,
      "mtp.depth": 0 if kind == "none" else 2, "eval.num_rows": 4,
    }
    workdir = save_run(folder / kind, tiny_runs.run_config(texts, shape))
    found[kind] = (
      f"--workdir={workdir}", f"--compilation_cache={folder / 'cache'}"
    )
  return found


@pytest.mark.parametrize("kind", ["medusa", "sequential"])
def test_a_tree_is_measured_kept_and_decoded_with(command, runs, kind):
  result = command("launch.tree", *runs[kind], "--nodes=9", "--ranks=5")
  assert result.code == 0, result.output
  workdir = runs[kind][0].removeprefix("--workdir=")
  path = f"{workdir}/tree.json"
  with open(path) as file:
    found = json.load(file)
  hits_KR = np.array(found["hits"])
  assert hits_KR.shape == (2, 5) and np.all(hits_KR.sum(axis=1) <= 1)
  tree = trees.best_static_tree(hits_KR, 9, spine_only=kind == "sequential")
  assert trees.read(path) == tree and tree.num_nodes == 9
  assert found["expected_tokens"] == trees.expected_tokens(tree, hits_KR)
  assert found["expected_tokens_of_chain"] == pytest.approx(
    1 + hits_KR[0, 0] * (1 + hits_KR[1, 0])
  )
  assert (found["split"], found["step"]) == ("validation", 0)
  assert found["num_positions"] > 0 and found["commit"]
  assert found["command"].startswith(f"python -m launch.tree --workdir={workdir} ")
  words = f"expected tokens per round: {found['expected_tokens']:.3f} with 9 nodes"
  assert words in result.output

  text = command(
    "launch.generate", *runs[kind], "--prompt=def ", "--max_new_tokens=16",
    f"--tree={path}",
  )
  assert text.code == 0, text.output
  assert "draft 2" in text.output
  assert text.output.endswith("identical to plain decoding: yes\n")


@pytest.mark.parametrize("kind, flags, message", [
  ("none", [], "the model has no extra predictors that draft."),
  ("medusa", ["--ranks=999"], "ranks must be 1 to 264, the vocabulary, got 999."),
  (
    "sequential", ["--ranks=2", "--nodes=5"],
    "num_nodes must be 1 to 4, as many as 2 draft(s) with 2 rank(s) have along the",
  ),
  ("medusa", ["--workdir=/no/run"], "--workdir must be a run folder, got '/no/run'"),
  ("medusa", ["--step=5"], "no checkpoint of step 5 in "),
])
def test_bad_input_ends_in_one_message(command, runs, kind, flags, message):
  result = command("launch.tree", *runs[kind], *flags)
  assert result.code == 2
  assert message in result.output
  assert "Traceback" not in result.output


def test_help_has_examples_and_needs_no_backend(command):
  result = command("launch.tree", "--help")
  assert result.code == 0 and not result.touched_backend
  assert "mtp-jax tree --workdir=" in result.output
