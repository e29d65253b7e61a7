"""The predictors against their definitions, and what must not change a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax import config as config_lib
from mtp_jax.lm import MtpLm, likeliest_tokens, unembed_matrix
from mtp_jax.model.block import Block
from mtp_jax.model.layers import make_norm
from mtp_jax.model.trunk import Trunk
from mtp_jax.predictors import num_trunk_layers
from mtp_jax.predictors.sequential import SequentialModule
from mtp_jax.sharding import unbox
from tests.common import (
  GPT2,
  INPUTS,
  MINIMAL,
  SHARED,
  TRUNKS,
  assert_trees_close,
  batch_of,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)

# Documents of a row of 16 tokens and the 4 after it; the last goes on after the row.
DOCUMENTS = ((0, 7), (7, 12), (12, 20))
WEIGHTS_M = np.float32([1, 0.5, 0.7, 0.3])


def one_row():
  tokens = np.random.default_rng(1).integers(0, 40, (1, 20))
  segments = np.repeat([1, 2, 3], [end - start for start, end in DOCUMENTS])
  return batch_of(tokens, segments[None], 16)


def hidden_states(config, params, batch):
  return jax.jit(MtpLm(config).apply)({"params": params}, batch)


def residual_states(config, params, batch):
  embedded_BTD = params["embed"]["embedding"][batch.tokens]
  if config.trunk.kind == "gpt2":
    embedded_BTD += params["position_embed"]["embedding"][batch.positions]
  trunk = Trunk(config.trunk, num_trunk_layers(config))
  return jax.jit(trunk.apply)(
    {"params": params["trunk"]}, embedded_BTD, batch.positions, batch.segment_ids
  )[0]


def sliced_chain(config, params, residual_TD, batch):
  """Each module alone, on the positions of each document that have a target.

  Returns `[{position: state} for each depth]`, position by position from the trunk's.
  """
  mtp, T = config.mtp, 16
  tokens = jnp.asarray(np.concatenate([batch.tokens, batch.next_tokens], axis=1)[0])
  embedding_VD = jnp.asarray(params["embed"]["embedding"])
  unembed_DV = unembed_matrix(params, config)
  norm = {"params": params["final_norm"]}
  normed_TD = make_norm(config.trunk).apply(norm, residual_TD)
  trunk_TD = normed_TD if mtp.hidden_norm == "after" else residual_TD
  found = [dict(enumerate(normed_TD)), {}, {}, {}]

  def given(k, i):
    if k == 1 or mtp.hidden == "trunk":
      return trunk_TD[i]
    if mtp.hidden == "chained":
      return found[k - 1][i]
    beyond = i + k - T
    return trunk_TD[i + k - 1] if beyond <= 0 else found[beyond][T - 1]

  def seen(k, i):
    if mtp.fed == "own":
      return embedding_VD[jnp.argmax(found[k - 1][i] @ unembed_DV)]
    return embedding_VD[tokens[i + k]]

  for k in (1, 2, 3):
    layer = () if mtp.share_modules else k - 1
    own = jax.tree.map(lambda x: x[layer], params["mtp"]["modules"])  # noqa: B023
    if mtp.fed == "none":  # Its part of the projection meets nothing.
      half = jnp.asarray(own["projection"]).at[config.trunk.embed_dim :].set(0)
      own = own | {"projection": half}
    for start, end in DOCUMENTS:
      places = range(start, min(end - 1 - k, T))
      length = len(places)
      states_1TD, _, _ = SequentialModule(config.trunk, mtp.out_norm, mtp.norm).apply(
        {"params": own},
        jnp.stack([given(k, i) for i in places])[None],
        jnp.stack([seen(k, i) for i in places])[None],
        jnp.arange(length)[None],
        jnp.ones((1, length), int),
      )
      found[k] |= dict(zip(places, states_1TD[0], strict=True))
  return found


@pytest.mark.parametrize(
  "trunk, options",
  mostly_slow(
    [
      ("llama", {}),
      ("gpt2", SHARED),
      *(("llama", options) for options in INPUTS.values()),
      ("gpt2", INPUTS["none"]),  # Its norms have biases.
      ("gpt2", MINIMAL),
    ],
    ("llama", {}), ("gpt2", SHARED),
  ),
)
def test_masked_chain_equals_slicing_each_document(trunk, options):
  config = tiny_config("sequential", 3, TRUNKS[trunk] | options)
  params, batch = random_params(config), one_row()
  hidden_MTD = hidden_states(config, params, batch)[:, 0]
  residual_TD = residual_states(config, params, batch)[0]
  sliced = jax.jit(lambda p, x: sliced_chain(config, p, x, batch))
  for k, expected in enumerate(sliced(params, residual_TD)):
    assert len(expected) == (16, 12, 10, 8)[k]
    for i, state_D in expected.items():
      np.testing.assert_allclose(
        hidden_MTD[k, i], state_D, 1e-4, 1e-5, err_msg=f"depth {k} at {i}"
      )


def test_parallel_heads_are_one_block_each_on_the_trunk_state():
  config = tiny_config("parallel", 3)
  params, batch = random_params(config), one_row()
  hidden_MBTD = hidden_states(config, params, batch)
  residual_BTD = residual_states(config, params, batch)
  final_norm = make_norm(config.trunk)
  for m in range(4):
    head = jax.tree.map(lambda x: x[m], params["mtp"]["heads"])  # noqa: B023
    out_BTD, _, _ = Block(config.trunk).apply(
      {"params": head}, residual_BTD, batch.positions, batch.segment_ids
    )
    expected = final_norm.apply({"params": params["final_norm"]}, out_BTD)
    np.testing.assert_allclose(hidden_MBTD[m], expected, 1e-4, 1e-5)


def test_linear_heads_multiply_the_normed_state():
  config = tiny_config("linear", 3)
  params, batch = random_params(config), one_row()
  hidden_MBTD = hidden_states(config, params, batch)
  for k in (1, 2, 3):
    expected = hidden_MBTD[0] @ params["mtp"]["maps"][k - 1]
    np.testing.assert_allclose(hidden_MBTD[k], expected, 1e-4, 1e-5)


def test_medusa_heads_begin_as_the_next_token_head_and_then_differ():
  config, batch = tiny_config("medusa", 3), one_row()
  init = lambda: MtpLm(config).init(jax.random.key(0), batch)["params"]  # noqa: E731
  start = hidden_states(config, unbox(jax.jit(init)()), batch)
  params = random_params(config)
  states = hidden_states(config, params, batch)
  h_BTD, heads = states[0], params["mtp"]
  for k in (1, 2, 3):
    np.testing.assert_array_equal(start[k], start[0])
    inner_BTD = h_BTD @ heads["kernels"][k - 1] + heads["biases"][k - 1]
    expected = h_BTD + inner_BTD / (1 + np.exp(-inner_BTD))
    np.testing.assert_allclose(states[k], expected, 1e-4, 1e-5)


@pytest.mark.parametrize("block_tokens", [1, 5, 14, 100])
def test_likeliest_tokens_by_block(block_tokens):
  rng = np.random.default_rng(0)
  hidden_BTD = rng.standard_normal((2, 7, 4), np.float32)
  unembed_DV = rng.standard_normal((4, 9), np.float32)
  found_BT = likeliest_tokens(hidden_BTD, unembed_DV, block_tokens)
  np.testing.assert_array_equal(found_BT, (hidden_BTD @ unembed_DV).argmax(-1))


def test_norms_of_modules_are_parameters_of_their_kind():
  def norms(options):
    shapes = unbox(accounting.abstract_params(tiny_config("sequential", 2, options)))
    modules = shapes["mtp"]["modules"]
    return {
      name: set(modules[name]) for name in ("hidden_norm", "embed_norm", "out_norm")
      if name in modules
    }, set(modules["block"]["mlp_norm"])

  layer, rms = {"scale", "bias"}, {"scale"}
  both = ("hidden_norm", "embed_norm")
  assert norms(GPT2) == (dict.fromkeys((*both, "out_norm"), layer), layer)
  assert norms(GPT2 | {"mtp.norm": "rms"}) == (
    dict.fromkeys((*both, "out_norm"), rms), layer
  )
  assert norms(GPT2 | INPUTS["bare"]) == (dict.fromkeys(both, layer), layer)
  assert norms(GPT2 | MINIMAL) == (dict.fromkeys(both, rms), layer)
  assert norms(MINIMAL) == (dict.fromkeys(both, rms), rms)


def test_unit_rms_of_what_the_unembedding_reads():
  # Every depth ends in a norm: with scale 1 the mean square of a state is 1.
  for kind in ("none", "parallel", "sequential"):
    config = tiny_config(kind, 0 if kind == "none" else 2)
    params = random_params(config)
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: np.ones_like(x) if path[-1].key == "scale" else x, params
    )
    states = hidden_states(config, params, packed_batch(config))
    np.testing.assert_allclose(np.mean(np.square(states), -1), 1, rtol=1e-3)


@pytest.fixture(scope="module")
def chain():
  """The sequential model at D = 3: config, parameters, compiled loss and gradient."""
  config = tiny_config("sequential", 3)
  return config, random_params(config), gradient_program(config)


def rows_of(documents, order, gaps=(0, 0, 0, 0)):
  """One row of 20 tokens: documents in the given order, each after its gap."""
  tokens, segments = np.full(20, 39), np.zeros(20, int)
  place = 0
  for count, (index, gap) in enumerate(zip(order, gaps, strict=False)):
    place += gap
    document = documents[index]
    tokens[place : place + len(document)] = document
    segments[place : place + len(document)] = count + 1
    place += len(document)
  return tokens, segments


def test_order_of_documents_and_padding_between_them_change_nothing(chain):
  _, params, program = chain
  rng = np.random.default_rng(2)
  packs = [[rng.integers(0, 38, n) for n in (5, 1, 4, 3)] for _ in range(8)]

  def run(order, gaps=(0, 0, 0, 0)):
    rows = [rows_of(pack, order, gaps) for pack in packs]
    tokens, segments = (np.stack(x) for x in zip(*rows, strict=True))
    return program(params, microbatches(batch_of(tokens, segments, 16)), WEIGHTS_M)

  expected = run((0, 1, 2, 3))
  assert expected[1].tolist() == [8 * n for n in (9, 6, 3, 1)]
  assert_trees_close(run((3, 0, 2, 1)), expected, 1e-4, 1e-5)
  assert_trees_close(run((0, 1, 2, 3), (1, 0, 1, 1)), expected, 1e-4, 1e-5)


def test_tokens_of_the_padding_change_nothing(chain):
  config, params, program = chain
  batch = packed_batch(config, seed=3, padding=True)
  other = batch._replace(
    tokens=np.where(batch.segment_ids == 0, 7, batch.tokens),
    next_tokens=np.where(batch.next_segment_ids == 0, 8, batch.next_tokens),
  )
  assert (other.tokens != batch.tokens).any()
  expected = program(params, microbatches(batch), WEIGHTS_M)
  assert_trees_close(
    program(params, microbatches(other), WEIGHTS_M), expected, 1e-6, 1e-7
  )


@pytest.mark.parametrize(
  "options",
  mostly_slow(
    [
      {"trunk.remat": "none"},
      {"trunk.remat": "full"},
      {"trunk.scan_layers": False},
      {"trunk.scan_layers": False, "trunk.remat": "none"},
    ],
    {"trunk.remat": "none"},
  ),
  ids=lambda options: "-".join(map(str, options.values())),
)
def test_remat_and_unrolling_change_nothing(chain, options):
  config, params, program = chain
  batch = microbatches(packed_batch(config))
  changed = config_lib.with_overrides(config, options)
  assert changed != config
  assert_trees_close(
    gradient_program(changed)(params, batch, WEIGHTS_M),
    program(params, batch, WEIGHTS_M),
    rtol=1e-4,
    atol=1e-5,
  )


def test_accumulation_with_uneven_masks_changes_nothing():
  config = tiny_config("linear", 3, {"trunk.num_layers": 1, "trunk.remat": "none"})
  params, program = random_params(config), gradient_program(config)
  batch = packed_batch(config, padding=True)
  # The last rows have no valid target at all: a mean of means would halve the loss.
  batch.segment_ids[-4:] = 0
  expected = program(params, microbatches(batch), WEIGHTS_M)
  for count in (2, 4):
    split = microbatches(batch, count)
    valid = (split.segment_ids > 0).sum((1, 2))
    assert len(set(valid)) > 1 and valid[-1] == 0
    assert_trees_close(program(params, split, WEIGHTS_M), expected, 1e-4, 1e-5)
