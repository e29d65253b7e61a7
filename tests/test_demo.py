"""The shipped checkpoint, and the command that shows it."""

import json
import re

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.checkpoint import save_params
from mtp_jax.data.tokenizers import ByteTokenizer
from tests import common

pytest_plugins = ("tests.commands",)

MOST_BYTES = 4 << 20


def test_the_checkpoint_is_small_and_its_origin_is_recorded():
  folder = mtp_jax.demo_checkpoint()
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= MOST_BYTES
  made = json.loads((folder / "made.json").read_text())
  assert made["command"].startswith("mtp-jax train demo")
  assert re.fullmatch(r"[0-9a-f]{40}", made["commit"])
  assert made["hardware"] and made["versions"]["jax"] and made["seed"] == 0


def test_stored_in_half_the_bits_parameters_are_loaded_as_they_were_written(tmp_path):
  config = common.tiny_config("sequential", 2)
  params = common.random_params(config)
  save_params(tmp_path / "small", 7, params, config, ByteTokenizer().to_json())
  model = mtp_jax.load(tmp_path / "small")
  assert model.step == 7 and model.config.mtp.depth == 2

  def same(stored, given):
    assert stored.dtype == np.float32
    assert stored == pytest.approx(given, rel=2**-8, abs=1e-30)

  jax.tree.map(same, model.params, params)


def test_the_demo_marks_who_proposed_each_token(command):
  result = command("launch.demo", "--max_new_tokens=24", "--color=never")
  assert result.code == 0, result.output
  greedy, sampled = result.output.split("--- Sampled")
  for part in (greedy, sampled):
    assert re.search(r"\n\. next-token prediction: \d+   x correction of", part)
    assert re.search(r"\n24 tokens, .* tau = [1-4]\.\d\d tokens per round\n", part)
  assert "\nidentical to plain decoding: yes\n" in greedy
  slower = re.search(r"plain decoding .*: 0\.\d\d times as fast\n", greedy)
  assert bool(slower) == ("mtp-jax train self_speculation" in sampled)
  assert "\x1b[" not in result.output


def test_the_demo_is_coloured_and_takes_a_prompt(command):
  result = command(
    "launch.demo", "--max_new_tokens=4", "--color=always", "--prompt=import "
  )
  assert result.code == 0 and "\x1b[" in result.output and "import " in result.output


def test_only_a_finished_run_is_shipped(command):
  result = command("launch.demo", f"--ship={mtp_jax.demo_checkpoint()}")
  assert result.code == 2
  assert "error: --ship must be a finished run, got '" in result.output
