"""What is saved comes back, bit for bit, or the reader is told why not."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import accounting, checkpoint, optimizer, run_folder
from mtp_jax.checkpoint import (
  ARCHITECTURE,
  RESUMABLE,
  Checkpointer,
  CheckpointError,
  check_resumable,
  fingerprint,
)
from mtp_jax.config import ConfigError, flatten, to_dict, with_overrides
from mtp_jax.predictors import contract
from mtp_jax.sharding import logical_axes, make_mesh
from mtp_jax.train_state import init_state, state_shardings
from tests.common import GPT2, MINIMAL, mostly_slow, tiny_config
from tests.untrained_runs import save_run

# Reads that were under way when Orbax gave up on a file complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)

CONFIG = tiny_config("sequential", 2)
MESHES = {
  "one": {},
  "eight": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
  "other eight": {"mesh.fsdp": 4, "mesh.context": 2},
}


@functools.cache
def layout(mesh="one", config=CONFIG):
  """The abstract TrainState of a config on a mesh."""
  sizes = with_overrides(config, MESHES[mesh]).mesh
  devices = jax.devices()[: 1 if mesh == "one" else 8]
  axes = logical_axes(accounting.abstract_params(config))
  chain = optimizer.make_optimizer(config.optimizer, axes)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(functools.partial(init_state, config, chain), 0),
    state_shardings(config, chain, make_mesh(sizes, devices)),
  )


def make_state(step, mesh="one", config=CONFIG):
  """A state of random numbers that differ for every step."""
  rng = np.random.default_rng(step)

  def draw(x):
    values = rng.integers(0, 1000, x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)

  state = jax.tree.map(draw, layout(mesh, config))
  return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def save(checkpointer, step, state=None, config=CONFIG):
  state = make_state(step) if state is None else state
  data, progress = {"batches": step}, {"seconds": step / 4}
  checkpointer.save(state, config, '{"tokenizer": 1}', data, progress)


def bits_of(state):
  return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def assert_is_step(restored, step):
  """Fails unless it is what `save(..., step)` saved, to the last bit."""
  assert restored.data == {"batches": step}
  assert restored.progress == {"seconds": step / 4}
  expected = make_state(step)
  assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
  assert bits_of(restored.state) == bits_of(expected)


@pytest.fixture
def checkpointer(tmp_path):
  made = Checkpointer(tmp_path)
  yield made
  made.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with checkpoints of steps 4 and 8."""
  folder = tmp_path_factory.mktemp("saved")
  made = Checkpointer(folder)
  for step in (4, 8):
    save(made, step)
  made.close()
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def test_everything_comes_back(saved):
  reader = Checkpointer(saved, read_only=True)
  assert reader.steps() == [4, 8]
  assert_is_step(reader.restore(layout(), CONFIG), 8)
  meta = reader.meta(8)
  assert meta["config"] == json.loads(json.dumps(to_dict(CONFIG)))
  assert meta["tokenizer"] == '{"tokenizer": 1}'
  assert meta["contract"] == contract(CONFIG)
  assert meta["contract"]["concat_order"] == ["hidden", "embedding"]
  reader.close()


def test_an_empty_folder_has_nothing_to_restore(checkpointer):
  assert checkpointer.restore(layout(), CONFIG) is None
  assert checkpointer.steps() == []


def test_the_newest_two_are_kept(tmp_path):
  made = Checkpointer(tmp_path, keep=2)
  for step in (1, 2, 3, 4):
    save(made, step)
  made.wait()
  assert made.steps() == [3, 4]
  save(made, 4)  # It is there: nothing happens.
  made.close()


def test_training_may_donate_the_state_while_it_is_saved(checkpointer):
  config = tiny_config("sequential", 2, {"trunk.embed_dim": 256, "trunk.mlp_dim": 512})
  state = make_state(1, config=config)
  expected = bits_of(state)

  @functools.partial(jax.jit, donate_argnums=0)
  def overwrite(tree):
    return jax.tree.map(lambda x: x + 1, tree)

  probe = jnp.ones(3)
  overwrite(probe)
  assert probe.is_deleted(), "nothing is donated here at all"
  save(checkpointer, 1, state, config)
  for _ in range(5):
    state = overwrite(state)
  restored = checkpointer.restore(layout(config=config), config)
  assert bits_of(restored.state) == expected


@pytest.mark.parametrize("mesh", ["eight", "other eight"])
def test_one_device_to_eight_and_back(saved, tmp_path, mesh):
  reader = Checkpointer(saved, read_only=True)
  config = with_overrides(CONFIG, MESHES[mesh])
  restored = reader.restore(layout(mesh), config)
  reader.close()
  assert_is_step(restored, 8)
  for leaf, wanted in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(layout(mesh)), strict=True
  ):
    assert leaf.sharding == wanted.sharding
  writer = Checkpointer(tmp_path)
  save(writer, 8, restored.state, config)
  assert_is_step(writer.restore(layout("one"), CONFIG), 8)
  writer.close()


def flip(path, position):
  data = bytearray(path.read_bytes())
  data[position] ^= 0x10
  path.write_bytes(data)


def largest_file(folder):
  files = (p for p in folder.rglob("*") if p.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def array_data(step_folder):
  return largest_file(step_folder / "state" / "ocdbt.process_0" / "d")


def change_number_in_meta(step_folder):
  """A change that leaves valid JSON of the right form."""
  path = largest_file(step_folder / "meta")
  path.write_text(path.read_text().replace('"batches": 8', '"batches": 9'))
  assert '"batches": 9' in path.read_text()


def change_fingerprint(step_folder):
  path = largest_file(step_folder / "meta")
  meta = json.loads(path.read_text())
  del meta["sha256"]
  meta["fingerprint"][3] += 1
  path.write_text(json.dumps(meta | {"sha256": checkpoint._sha256(meta)}))


def remove_contents(step_folder):
  shutil.rmtree(step_folder)
  step_folder.mkdir()


DAMAGES = {
  "array data cut short": lambda f: os.truncate(array_data(f), 2000),
  "array data emptied": lambda f: array_data(f).write_bytes(b""),
  "array data deleted": lambda f: array_data(f).unlink(),
  "a byte of array data": lambda f: flip(array_data(f), 1000),
  "array metadata deleted": lambda f: (f / "state" / "_METADATA").unlink(),
  "arrays deleted": lambda f: shutil.rmtree(f / "state"),
  "meta deleted": lambda f: shutil.rmtree(f / "meta"),
  "meta cut short": lambda f: os.truncate(largest_file(f / "meta"), 500),
  "a number of meta": change_number_in_meta,
  "arrays that are not what was saved": change_fingerprint,
  "an empty folder": remove_contents,
}


@pytest.mark.parametrize("damage", mostly_slow(DAMAGES, next(iter(DAMAGES))))
def test_damage_is_reported_and_the_one_before_is_used(copy, damage):
  DAMAGES[damage](copy / "checkpoints" / "8")
  made = Checkpointer(copy)
  with pytest.warns(UserWarning, match=r"checkpoints/8 is damaged .*one before"):
    restored = made.restore(layout(), CONFIG)
  assert_is_step(restored, 4)
  assert made.steps() == [4]
  assert [p.stem for p in (copy / "damaged_checkpoints").iterdir()] == ["8"]
  save(made, 8)  # Training comes by again.
  assert_is_step(made.restore(layout(), CONFIG), 8)
  assert made.steps() == [4, 8]
  made.close()


@pytest.mark.slow
def test_no_flipped_byte_goes_unnoticed(copy):
  rng = np.random.default_rng(0)
  folder = copy / "checkpoints" / "8"
  files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
  reader = Checkpointer(copy, read_only=True)
  num_noticed = 0
  for path in files:
    position = int(rng.integers(path.stat().st_size))
    flip(path, position)
    with warnings.catch_warnings(record=True):
      warnings.simplefilter("always")
      restored = reader.restore(layout(), CONFIG)
    noticed = int(restored.state.step) == 4
    num_noticed += noticed
    assert_is_step(restored, 4 if noticed else 8)
    flip(path, position)
  assert num_noticed > 3
  assert_is_step(reader.restore(layout(), CONFIG), 8)
  reader.close()


def test_reading_leaves_a_damaged_checkpoint_where_it_is(copy):
  DAMAGES["array data deleted"](copy / "checkpoints" / "8")
  reader = Checkpointer(copy, read_only=True)
  with pytest.warns(UserWarning, match="damaged"):
    assert_is_step(reader.restore(layout(), CONFIG), 4)
  reader.close()
  assert (copy / "checkpoints" / "8").exists()
  assert not (copy / "damaged_checkpoints").exists()


def test_nothing_whole_is_an_error(copy):
  for step in ("4", "8"):
    DAMAGES["array data deleted"](copy / "checkpoints" / step)
  made = Checkpointer(copy)
  with (
    pytest.warns(UserWarning, match="damaged"),
    pytest.raises(CheckpointError, match=r"no whole checkpoint in .*steps \[8, 4\]"),
  ):
    made.restore(layout(), CONFIG)
  assert made.steps() == [4, 8], "nothing may be moved while nothing better is known"
  made.close()


def test_a_save_that_was_killed_is_reported(copy, capsys):
  half = copy / "checkpoints" / "12.orbax-checkpoint-tmp-0"
  shutil.copytree(copy / "checkpoints" / "8", half)
  made = Checkpointer(copy)
  assert_is_step(made.restore(layout(), CONFIG), 8)
  assert "checkpoints/12 was not finished" in capsys.readouterr().err
  save(made, 12)
  made.close()
  assert not half.exists()
  assert made.steps() == [8, 12]


def wait_until_still(folder):
  listing = None
  while listing != (listing := sorted(folder.rglob("*"))):
    time.sleep(0.3)


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(copy, capsys):
  made = Checkpointer(copy)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    with pytest.raises(CheckpointError, match=r"could not write .*steps \[4, 8\]"):
      save(made, 12)
      made.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  made.close()
  wait_until_still(copy)  # Writes of the failed save go on in the background.
  after = Checkpointer(copy)
  assert_is_step(after.restore(layout(), CONFIG), 8)
  assert "not finished" in capsys.readouterr().err
  save(after, 12)
  after.close()
  assert after.steps() == [8, 12]


def test_another_architecture_is_refused(saved):
  other = tiny_config("sequential", 3, {"optimizer.learning_rate": 1.0})
  reader = Checkpointer(saved, read_only=True)
  with pytest.raises(ConfigError) as error:
    reader.restore(layout(config=other), other)
  reader.close()
  assert str(error.value).splitlines()[0].startswith("the run folder holds a run with")
  assert str(error.value).splitlines()[1:] == [
    "  mtp.depth: 2 there, 3 now",  # Architecture first.
    "  optimizer.learning_rate: 0.003 there, 1.0 now",
  ]
  assert "another architecture" in str(error.value)


def test_another_contract_is_refused(saved, monkeypatch):
  swapped = contract(CONFIG) | {"concat_order": ["embedding", "hidden"]}
  monkeypatch.setattr(checkpoint, "contract", lambda config: swapped)
  reader = Checkpointer(saved, read_only=True)
  with pytest.raises(ConfigError, match=r"another contract.*'hidden', 'embedding'"):
    reader.restore(layout(), CONFIG)
  reader.close()


def test_one_step_may_be_asked_for(saved):
  reader = Checkpointer(saved, read_only=True)
  assert_is_step(reader.restore(layout(), CONFIG, step=4), 4)
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .*\[4, 8\]"):
    reader.restore(layout(), CONFIG, step=5)
  reader.close()


def test_another_training_is_refused():
  with pytest.raises(ConfigError, match="another training"):
    check_resumable(CONFIG, with_overrides(CONFIG, {"train.num_steps": 7}))


def other_value(key, value):
  choices = {
    "trunk.remat": "full",
    "trunk.scan_layers": "off",
    "trunk.attention": "xla",
    "trunk.moe.grouped_matmul": "ragged",
    "eval.split": "test",
  }
  if key in choices:
    return choices[key]
  if isinstance(value, bool):
    return not value
  return value + type(value)(1)


@pytest.mark.parametrize("key", sorted(RESUMABLE))
def test_resumable_keys_may_change(key):
  value = flatten(to_dict(CONFIG))[key]
  check_resumable(CONFIG, with_overrides(CONFIG, {key: other_value(key, value)}))


def test_no_key_of_the_architecture_may_change():
  assert ARCHITECTURE and RESUMABLE and not ARCHITECTURE & RESUMABLE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "bool"])
def test_fingerprint_sees_every_bit_and_the_order(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 2, (5, 7)), dtype)
  seen = {int(fingerprint([x])[0])}
  size = x.dtype.itemsize
  for bit in range(1 if dtype == "bool" else 8 * size):
    words = np.array(x).view(f"u{size}")
    words[3, 3] ^= words.dtype.type(1 << bit)
    seen.add(int(fingerprint([words.view(x.dtype)])[0]))
  for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
    values = np.zeros(x.shape, x.dtype)
    values[a] = 1
    first = int(fingerprint([values])[0])
    values[a], values[b] = 0, 1
    assert first != int(fingerprint([values])[0])
  assert len(seen) == (2 if dtype == "bool" else 1 + 8 * size)


def test_fingerprint_is_the_same_on_every_mesh():
  prints = [fingerprint(make_state(5, mesh)).tolist() for mesh in MESHES]
  assert prints[0] == prints[1] == prints[2]


@pytest.mark.parametrize(
  "kind, depth, key, value",
  [
    ("none", 0, "hidden_source", None),
    ("parallel", 2, "hidden_source", "trunk residual stream before the final norm"),
    ("parallel", 2, "next_token_head", "first parallel head"),
    ("sequential", 2, "output_norm", "own norm per module"),
    ("sequential", 2, "module_norms", "as in the trunk"),
    ("linear", 2, "module_norms", None),
    ("linear", 2, "concat_order", None),
    ("medusa", 2, "hidden_source", "trunk output after its final norm"),
    ("eagle", 2, "output_norm", None),
    ("eagle", 2, "concat_order", ["hidden", "embedding"]),
    (
      "eagle3", 2, "hidden_source",
      "depth 1: a linear map of the trunk residual streams after layers 1, 2, 3; "
      "depth k: the un-normed output of depth k - 1, by the same layer",
    ),
    ("eagle3", 2, "embedding_source", "token i + k"),
  ],
)
def test_contract_says_how_to_read_the_parameters(kind, depth, key, value):
  found = contract(tiny_config(kind, depth))
  assert found["kind"] == kind
  assert found["depth"] == depth
  assert found[key] == value


@pytest.mark.parametrize(
  "options, hidden, embedding",
  [
    (
      {}, "depth 1: trunk output after its final norm; depth k: the normed output of "
      "module k - 1", "token i + k",
    ),
    (
      {"mtp.hidden": "trunk", "mtp.hidden_norm": "before", "mtp.fed": "none"},
      "depth 1: trunk output before its final norm; depth k: the same", None,
    ),
    (
      {"mtp.hidden": "trunk_shifted", "mtp.fed": "own"},
      "depth 1: trunk output after its final norm; depth k: the same, k - 1 positions "
      "on", "arg max of depth k - 1",
    ),
  ],
)
def test_contract_says_what_modules_start_from(options, hidden, embedding):
  found = contract(tiny_config("sequential", 2, options))
  assert found["hidden_source"] == hidden
  assert found["embedding_source"] == embedding


def test_contract_says_what_positions_are():
  assert contract(tiny_config("none", 0, GPT2 | {"data.seq_len": 24}))["positions"] == {
    "kind": "learned", "count": 24,
  }
  options = {"trunk.rope_theta": 5e5, "trunk.rope_scaling.kind": "linear"}
  found = contract(tiny_config("none", 0, options | {"trunk.rope_scaling.factor": 2.0}))
  assert found["positions"]["kind"] == "rotary" and found["positions"]["theta"] == 5e5
  scaling = found["positions"]["scaling"]
  assert (scaling["kind"], scaling["factor"]) == ("linear", 2.0)
  assert found == json.loads(json.dumps(found))  # As it comes back from a checkpoint.


def test_contract_says_which_norms_modules_have():
  found = contract(tiny_config("sequential", 2, MINIMAL))
  assert found["output_norm"] is None
  assert found["module_norms"] == "RMSNorm"
  assert found["hidden_source"] == (
    "depth 1: trunk output after its final norm; depth k: the output of module k - 1"
  )


DAMAGED = """
import sys, pathlib
import mtp_jax
for workdir in sys.argv[1:]:
  print(mtp_jax.load(pathlib.Path(workdir)).step)
"""


@pytest.mark.slow
def test_a_damaged_file_is_reported_in_few_lines(tmp_path):
  run = save_run(tmp_path / "whole", tiny_config("sequential", 2))
  copies = []
  for name in ("cut", "gone", "changed"):
    copies.append(shutil.copytree(run, tmp_path / name))
    checkpoints = copies[-1] / "checkpoints"
    newest = shutil.copytree(checkpoints / "0", checkpoints / "5")
    files = [file for file in newest.glob("state/**/d/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    for i in range(1000, len(content), 97):
      content[i] ^= 255
    largest.write_bytes(content[: len(content) // 2] if name == "cut" else content)
    if name == "gone":
      largest.unlink()
  ended = subprocess.run(
    [sys.executable, "-c", DAMAGED, *copies],
    capture_output=True, text=True, check=True,
  )
  assert ended.stdout.split() == ["0"] * 3
  assert ended.stderr.count("is damaged") == 3
  assert len(ended.stderr.splitlines()) == 6  # Each with the line that warns.


def test_other_names_among_checkpoints_are_no_checkpoints(tmp_path):
  run = save_run(tmp_path / "run", tiny_config())
  for name in ("notes.txt", "7"):
    (run / "checkpoints" / name).write_text("")
  for name in ("old_12", "12.bak", "²"):
    (run / "checkpoints" / name).mkdir()
  assert run_folder.finished_steps(run) == [0]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = Checkpointer(run)
    assert found._unfinished == []
    found.close()
