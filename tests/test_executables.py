"""Programs that are compiled ahead are what training and evaluation call."""

import collections
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import executables
from mtp_jax.train import fit
from tests.tiny_runs import run_config, write_texts

_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
  """Counts compilations by name of the program, from the disk cache or not."""
  counts = collections.Counter()

  def count(event: str, _: float, fun_name: str = "", **__: object) -> None:
    counts[fun_name.removeprefix("jit(").removesuffix(")")] += event == _COMPILED

  jax.monitoring.register_event_duration_secs_listener(count)
  yield counts
  jax.monitoring.unregister_event_duration_listener(count)


# The batches of a task have fields that say which tokens are scored.
_TASK = {
  "data.source": "star_graph", "data.path": "", "data.validation_fraction": 0.05,
  "data.seq_len": 40, "tokenizer.kind": "symbols", "tokenizer.vocab_size": 40,
  "eval.rows_per_document": 4, "eval.line_prompts": 64, "eval.function_prompts": 32,
  "eval.max_new_tokens": 64, "eval.task_examples": 8,
}
_TEXT = {"data.seq_len": 56}


@pytest.mark.parametrize("source", [_TEXT, _TASK], ids=["text", "task"])
def test_a_run_compiles_each_program_once(tmp_path, compilations, source):
  overrides = source | {"mtp.depth": 1, "trunk.num_layers": 1}
  config = run_config(write_texts(tmp_path / "texts"), overrides)
  began = []
  original = executables._threads.submit
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      executables._threads, "submit", lambda work: began.append(1) or original(work)
    )
    fit(config, tmp_path / "run", progress=False)
  names = ("train_step", "gradient_diagnostics", "row_sums")
  assert len(began) == len(names) + 1
  assert {name: compilations[name] for name in names} == dict.fromkeys(names, 1)
  # Text is decoded greedily and sampled.
  count = 1 + (source is _TEXT)
  assert (compilations["prefill"], compilations["finish"]) == (count, count)


def test_what_fails_ahead_fails_where_it_is_called():
  program = jax.jit(lambda x: jnp.ones(2) + jnp.ones(x.shape[0]))
  executables.compile_ahead(program, jax.ShapeDtypeStruct((3,), np.float32))
  with pytest.raises(TypeError, match="incompatible shapes"):
    executables.compiled(program, np.ones(3, np.float32))
  assert executables.awaited(program)(np.ones(2, np.float32)).shape == (2,)


def test_what_has_not_begun_is_dropped():
  release = threading.Event()
  blocking = [executables._threads.submit(release.wait) for _ in range(2)]
  try:
    program = jax.jit(lambda x: 3 * x)
    executables.compile_ahead(program, jax.ShapeDtypeStruct((), np.float32))
    assert executables.is_compiling()
    executables.stop_ahead()
    assert not executables.is_compiling()
    assert executables.compiled(program, np.float32(2))(np.float32(2)) == 6
  finally:
    release.set()
  assert all(future.result() for future in blocking)
