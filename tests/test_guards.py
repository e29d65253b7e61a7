"""What a change of the code's structure must leave as it was, held against files.

`tests/golden` was written at commit 7635d30 by `python -m tests.test_guards`. A change
that is made on purpose writes its file again and says so.
"""

import dataclasses
import filecmp
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mtp_jax
from experiments import base
from mtp_jax import accounting, run_folder, train
from mtp_jax import config as config_lib
from mtp_jax.analysis.findings import write_findings
from mtp_jax.predictors import contract
from mtp_jax.sharding import unbox
from mtp_jax.train_step import loss_and_grads
from tests import common, hf_folders, test_drafter_files
from tests.tiny_runs import read_metrics

GOLDEN = Path(__file__).parent / "golden"
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "findings"
TRUNKS = {
  "llama": {"trunk.qk_norm": True},
  "gpt2": common.GPT2,
  "latent": common.LATENT,
  "experts": common.EXPERTS,
}
OWN = {"mtp.unembed": "own"}
# Name -> kind, depth and overrides, each on every trunk that it can have.
PREDICTORS = {kind: (kind, depth, {}) for kind, depth in common.KINDS} | {
  "parallel of 1": ("parallel", 0, {}),
  "markov": ("parallel", 2, {"mtp.markov_rank": 6}),
  "shared": ("sequential", 2, common.SHARED),
  "minimal": ("sequential", 2, common.MINIMAL),
  "medusa, own": ("medusa", 2, OWN),
  "peagle, own": ("peagle", 2, OWN | {"mtp.draft_vocab": 12, "mtp.mlp_dim": 20}),
  "dflash, own": (
    "dflash", 2,
    OWN | {"mtp.draft_vocab": 12, "mtp.mlp_dim": 20, "mtp.draft_layers": 1},
  ),
  "top, own": ("top", 1, OWN),
  "eagle3, own": ("eagle3", 2, OWN | {"mtp.draft_vocab": 12, "mtp.mlp_dim": 20}),
}
FLOAT64 = {"trunk.compute_dtype": "float64", "data.batch_size": 4}
LEARNT = {
  "parallel gpt2": ("parallel", 2, common.GPT2),
  "sequential experts": ("sequential", 3, common.EXPERTS | {"mtp.fed": "own"}),
  "eagle3 llama": ("eagle3", 3, OWN | {
    "mtp.draft_vocab": 12, "mtp.objective": "kl", "mtp.feature_weight": 0.5,
  }),
}
# A run of 8 steps of which the folder holds the first 4.
RUN = {
  "name": "golden",
  "trunk.num_layers": 2, "trunk.embed_dim": 8, "trunk.mlp_dim": 16,
  "trunk.num_heads": 2, "trunk.num_kv_heads": 1,
  "mtp.kind": "sequential", "mtp.depth": 2,
  "data.source": "star_graph", "tokenizer.kind": "symbols",
  "tokenizer.vocab_size": 24, "data.seq_len": 64, "data.batch_size": 8,
  "task.num_train": 64, "task.star_graph.arms": 2, "task.star_graph.length": 3,
  "task.star_graph.num_labels": 8,
  "train.num_steps": 8, "train.log_every": 1, "train.eval_every": 4,
  "checkpoint.every_steps": 4, "eval.num_rows": 8, "eval.batch_size": 8,
  "eval.task_examples": 8,
}


def parameters():
  """Returns `{trunk, predictors: {path: shape}}` of every model."""
  found = {}
  for trunk, of_trunk in TRUNKS.items():
    for name, (kind, depth, values) in PREDICTORS.items():
      if trunk == "latent" and "eagle" in name:
        continue
      config = common.tiny_config(kind, depth, of_trunk | values)
      tree = accounting.abstract_params(config)
      found[f"{trunk}, {name}"] = {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(unbox(tree))
      }
  return found


def facts():
  """Returns `{predictors: contract and counts}` on one trunk."""
  configs = {
    name: common.tiny_config(kind, depth, {"trunk.num_layers": 4} | values)
    for name, (kind, depth, values) in PREDICTORS.items()
  }
  return {
    name: contract(config) | dataclasses.asdict(accounting.count(config))
    for name, config in configs.items()
  }


def tensors():
  """Returns `{layout and case: {tensor: shape}}` of what every layout exports."""
  found = {}
  for module in (hf_folders, test_drafter_files):
    for case in module.CASES:
      with tempfile.TemporaryDirectory() as folder:
        module.write(case, Path(folder) / "out")
        (file,) = (Path(folder) / "out").glob("*.safetensors")
        found[case] = {name: list(x.shape) for name, x in load_file(file).items()}
  return {case: dict(sorted(names.items())) for case, names in found.items()}


def learnt(name):
  """Returns loss, losses of the depths, and norm and sum of every gradient."""
  kind, depth, values = LEARNT[name]
  config = common.tiny_config(kind, depth, FLOAT64 | values)
  with jax.enable_x64(True):
    params = jax.tree.map(np.float64, common.random_params(config))
    if config.mtp.draft_vocab:
      params["mtp"]["draft_tokens"] = 3.0 * np.arange(12)
    batch = common.microbatches(common.packed_batch(config, padding=True), 2)
    weights_M = jnp.array([1.0, 0.5, 0.3, 0.2][: 1 + depth], jnp.float64)
    step = jax.jit(functools.partial(loss_and_grads, config))
    sums, _, grads = step(params, batch, weights_M)
    summed = jax.tree.map(lambda x: [jnp.linalg.norm(x.ravel()), jnp.sum(x)], grads)
  flat = jax.tree_util.tree_leaves_with_path(summed)
  return {
    "total": float(sums.total),
    **{f"nll {m}": float(x) for m, x in enumerate(sums.nll_M)},
    **{jax.tree_util.keystr(path): float(x) for path, x in flat},
  }


def losses(folder):
  """Returns what a run measured: losses by kind of record and step."""
  return [
    [x["kind"], x["step"], x["loss"]] for x in read_metrics(folder) if "loss" in x
  ]


@pytest.mark.slow
def test_parameters_have_the_names_and_shapes_that_they_had():
  assert parameters() == json.loads((GOLDEN / "parameters.json").read_text())


@pytest.mark.slow
def test_contracts_and_counts_are_what_they_were():
  assert facts() == json.loads((GOLDEN / "facts.json").read_text())


@pytest.mark.slow
def test_layouts_have_the_tensors_that_they_had():
  assert tensors() == json.loads((GOLDEN / "tensors.json").read_text())


@pytest.mark.parametrize("name", common.mostly_slow(LEARNT, "parallel gpt2"))
def test_losses_and_gradients_are_what_they_were(name):
  expected = json.loads((GOLDEN / "learnt.json").read_text())[name]
  assert learnt(name) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.slow
def test_a_run_folder_of_older_code_is_loaded_and_continued(tmp_path):
  expected = json.loads((GOLDEN / "losses.json").read_text())
  folder = shutil.copytree(GOLDEN / "run", tmp_path / "run")
  model = mtp_jax.load(folder)
  assert (model.step, model.config.mtp.depth) == (4, 2)
  train.fit(run_folder.read_config(folder), folder, progress=False)
  found = losses(folder)
  assert [x[:2] for x in found] == [x[:2] for x in expected]
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)


@pytest.mark.slow
def test_the_findings_are_the_committed_ones(tmp_path):
  write_findings(RESULTS.parent, tmp_path)
  for name in ("findings.csv", "estimates.csv"):
    assert filecmp.cmp(tmp_path / name, RESULTS / name, shallow=False), name


def _write():
  def dump(name, value):
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    (GOLDEN / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")

  dump("parameters.json", parameters())
  dump("facts.json", facts())
  dump("tensors.json", tensors())
  dump("learnt.json", {name: learnt(name) for name in LEARNT})
  default = config_lib.from_config_dict(base.get_config())
  with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "run"
    train.fit(config_lib.with_overrides(default, RUN), run, progress=False)
    (GOLDEN / "losses.json").write_text(json.dumps(losses(run)) + "\n")
    for name in ("checkpoints/8", "tensorboard"):
      shutil.rmtree(run / name)
    for name in ("DONE", "eval.json", "startup.json"):
      (run / name).unlink()
    shutil.rmtree(GOLDEN / "run", ignore_errors=True)
    shutil.copytree(run, GOLDEN / "run")


if __name__ == "__main__":
  _write()
