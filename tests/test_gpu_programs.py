"""Programs for GPUs and TPUs, lowered on a machine that has neither, or compiled.

Lowering runs everywhere, in seconds: it shows which kernels a program calls. The slow
tests compile for an H200 where XLA's compiler for GPUs is installed.
"""

import contextlib
import functools
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.planning import topologies
from launch.planning.chips import CHIPS
from mtp_jax import layouts, losses, pack_program, sharding
from mtp_jax.decode import loop
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.decode.target import unstack
from mtp_jax.evaluate import row_sums_program
from mtp_jax.lm import zeros_batch
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, make_trial_mesh
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import programs
from tests.common import EXPERTS, GPT2, KINDS, mostly_slow, tiny_config

VOCAB, WIDTH = 1160, 32  # No other dimension is equal to one of them.
H200 = CHIPS["h200"]
# As small as kernels of GPUs allow: heads of 8, rows of even length.
SMALL = {
  "trunk.num_layers": 2,
  "trunk.embed_dim": WIDTH,
  "trunk.mlp_dim": 48,
  "tokenizer.vocab_size": VOCAB,
  "loss.block_tokens": 64,
  "trunk.scan_layers": "on",
  "trunk.remat": "names",
}
FORWARD, BACKWARD = (
  re.compile(rf"custom_call @__cudnn\$fmha\w*{end}\(")
  for end in ("Softmax", "SoftmaxBackward")
)
has_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None,
  reason="jax-cuda12-plugin is not installed: pip install -r requirements-plan.txt",
)


@contextlib.contextmanager
def compiled_for(name):
  """Makes the package choose what it chooses on that platform."""
  asked = sharding.platform
  with pytest.MonkeyPatch.context() as patch, topologies.kernels_of(H200):
    for module in list(sys.modules.values()):
      if getattr(module, "platform", None) is asked:
        patch.setattr(module, "platform", lambda: name)
    yield


def lowered(config, name="gpu", part="step"):
  """Returns the text of a program of a config, lowered for a platform."""
  program = program_config(config)
  mesh = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for(name), jax.set_mesh(mesh):
    made = programs.__wrapped__(program, mesh)
    inputs = layouts.abstract_inputs(program, mesh)
    if part == "diagnostics":
      state, batch, hyper, _ = inputs
      inputs = state.params, batch, hyper, state.step
    traced = getattr(made, part).trace(*inputs)
    return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(name, name),)).as_text()


def calls(text):
  return len(FORWARD.findall(text)), len(BACKWARD.findall(text))


def whole_logits(text, tokens):
  """Returns the float32 arrays with a vocabulary and at least so many tokens."""
  shapes = set(re.findall(r"tensor<([\dx]+)xf32>", text))
  arrays = [tuple(map(int, dims.split("x"))) for dims in shapes]
  arrays = [x for x in arrays if VOCAB in x and WIDTH not in x]
  return [x for x in arrays if math.prod(x) >= tokens * VOCAB]


STACKS = {"sequential": 2, "parallel": 2}


@pytest.mark.parametrize(("kind", "depth"), mostly_slow(KINDS, ("sequential", 3)))
def test_every_kind_attends_once_in_each_direction(kind, depth):
  """One call per stack of layers: nothing is computed again in the backward pass."""
  text = lowered(tiny_config(kind, depth, SMALL))
  stacks = STACKS.get(kind, 1)
  if not kind.startswith("eagle"):
    assert calls(text) == (stacks, stacks)
  else:
    # The trunk has no gradient into it; the layer reads the first keys and later ones.
    forward, backward = calls(text)
    assert forward >= 1 and backward <= forward
  assert not whole_logits(text, 8 * 16)
  assert "bf16" in text


VARIED = {
  "gpt2": (GPT2, 1),
  # Calls of equal layers are one function of the text.
  "unrolled": ({"trunk.scan_layers": "off", "trunk.remat": "none"}, 1),
  "unrolled-names": ({"trunk.scan_layers": "off"}, 1),
  "accumulation": ({"train.accumulation_steps": 2}, 1),
  "muon": ({"optimizer.kind": "muon"}, 1),
  "experts": (EXPERTS, 2),  # The first layer is dense: two stacks.
}


@pytest.mark.parametrize("name", mostly_slow(VARIED, "unrolled-names"))
def test_variants_of_the_step_attend_once(name):
  values, stacks = VARIED[name]
  text = lowered(tiny_config("none", 0, SMALL | values))
  assert calls(text) == (stacks, stacks)


def test_full_rematerialisation_attends_again():
  """So the tests above can fail."""
  text = lowered(tiny_config("none", 0, SMALL | {"trunk.remat": "full"}))
  assert calls(text) == (2, 1)


def test_logits_of_all_tokens_would_be_found():
  text = lowered(tiny_config("none", 0, SMALL | {"loss.block_tokens": 128}))
  assert whole_logits(text, 8 * 16)


def test_blocks_of_the_loss_have_a_gigabyte():
  with compiled_for("gpu"):
    assert losses.tokens_per_block(0, 50304) == 5336
    assert losses.tokens_per_block(0, 264) > 1_000_000
    assert losses.tokens_per_block(0, 264, trials=8) == (1 << 30) // (4 * 264 * 8)
    assert losses.tokens_per_block(77, 264) == 77
  assert losses.tokens_per_block(0, 264) == 1024


def test_one_pass_over_logits_finds_the_same():
  """On a GPU the largest logit and the sum come from one reduction."""
  logits = 30 * jax.random.normal(jax.random.key(0), (7, 301))
  expected = losses._top_and_sum(logits)
  with compiled_for("gpu"):
    program = jax.jit(lambda x: losses._top_and_sum(x))
    found = program(logits)
    text = program.lower(logits).as_text()
    lost = losses._top_and_sum(logits.at[2, 5].set(jnp.nan).at[3, 1].set(jnp.inf))
  assert text.count("stablehlo.reduce") == 1
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert [bool(x) for x in np.isfinite(lost[1][:, 0])] == [True] * 2 + [False] * 2 + (
    [True] * 3
  )


@pytest.mark.parametrize("part", ["diagnostics", "init"])
def test_other_programs_of_training_lower(part):
  config = tiny_config("sequential", 2, SMALL)
  if part == "diagnostics":
    assert calls(lowered(config, part=part)) == (2, 2)
  else:
    program = program_config(config)
    mesh = make_mesh(program.mesh, jax.devices()[:1])
    with compiled_for("gpu"), jax.set_mesh(mesh):
      made = programs.__wrapped__(program, mesh)
      traced = made.init.trace(np.int32(0))
      assert traced.lower(lowering_platforms=("cuda",)).as_text()


def test_evaluation_attends_once():
  config = tiny_config("sequential", 2, SMALL)
  program = program_config(config)
  mesh = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for("gpu"), jax.set_mesh(mesh):
    state = layouts.abstract_state(program, mesh)
    batch = jax.eval_shape(lambda: zeros_batch(config, 8))
    table = jax.ShapeDtypeStruct((VOCAB,), np.int32)
    traced = row_sums_program.__wrapped__(program, mesh).trace(
      state.params, batch, table
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert calls(text) == (2, 0) and not whole_logits(text, 8 * 16)


@pytest.mark.parametrize(("kind", "depth", "values"), mostly_slow(
  [("none", 0, {}), ("sequential", 2, {}), ("sequential", 1, EXPERTS)],
  ("sequential", 2, {}),
))
def test_decoding_lowers(kind, depth, values):
  config = tiny_config(kind, depth, SMALL | values)
  plan = make_plan(config, Decoding())
  with compiled_for("gpu"):
    program = program_config(config)
    mesh = make_mesh(program.mesh, jax.devices()[:1])
    params = layouts.abstract_state(program, mesh).params
    weights = jax.eval_shape(lambda p: unstack.__wrapped__(p, config), params)
    inputs = loop.Inputs(weights, weights, None, np.zeros(1, np.int32))
    slots = loop.slots_for(24, plan.drafter.num_drafted)
    rows = jax.ShapeDtypeStruct((2,), np.int32)
    tokens = jax.ShapeDtypeStruct((2, slots), np.int32)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    arguments = (inputs, tokens, rows, rows, seed, rows)
    prefill = jax.jit(functools.partial(loop.prefill.__wrapped__, plan, 16))
    state = jax.eval_shape(prefill, *arguments)
    finish = jax.jit(functools.partial(loop.finish.__wrapped__, plan))
    for traced in (prefill.trace(*arguments), finish.trace(inputs, state)):
      assert traced.lower(lowering_platforms=("cuda",)).as_text()


def stacked(config, trials):
  """Returns the text of the step of a pack, lowered for a GPU."""
  program, mesh = program_config(config), make_trial_mesh(jax.devices()[:1])
  one = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for("gpu"):
    state, batch, _, _ = layouts.abstract_inputs(program, one)
    trial = state, hyperparameters(config), np.bool_(True), np.bool_(True)
    states, *others = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((trials, *np.shape(x)), x.dtype), trial
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with jax.set_mesh(mesh):
      step = pack_program.stacked_step.__wrapped__(program, mesh, True)
      traced = step.trace(states, batch, *others)
      return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_pack_has_no_kernel_that_cannot_be_stacked():
  text = stacked(tiny_config("none", 0, SMALL | {"trunk.attention": "auto"}), 2)
  assert "bf16" in text and "cudnn" not in text


def test_trials_of_a_pack_share_the_bytes_of_a_block(monkeypatch):
  """In a pack a block has as many logits as in a lone run."""
  monkeypatch.setattr(sharding, "_BLOCK_BYTES", 64 * 4 * VOCAB)
  text = stacked(tiny_config("none", 0, SMALL | {"loss.block_tokens": 0}), 4)
  assert not whole_logits(text, 65) and whole_logits(text, 64)


@pytest.mark.parametrize(("kind", "depth", "values"), mostly_slow(
  [*((kind, depth, {}) for kind, depth in KINDS), ("none", 0, EXPERTS)],
  ("sequential", 3, {}),
))
def test_every_kind_lowers_for_tpus(kind, depth, values):
  text = lowered(tiny_config(kind, depth, SMALL | values), "tpu")
  assert "bf16" in text and "cudnn" not in text and not whole_logits(text, 8 * 16)
  assert ("ragged_dot" in text) == bool(values)
