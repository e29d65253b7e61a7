"""EAGLE's layer against a drafter in NumPy that goes on token by token, and training.

What decoding makes of it is tested for all kinds in test_decode.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import with_overrides
from mtp_jax.lm import MtpLm
from mtp_jax.model.block import Block
from mtp_jax.model.trunk import Trunk
from mtp_jax.predictors import num_trunk_layers, tapped_layers
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh
from mtp_jax.train_state import Hyperparameters
from mtp_jax.train_step import programs
from tests.common import (
  EXPERTS,
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

T, DEPTH = 14, 3
# The third document goes on after the row.
DOCUMENTS = ((0, 6), (6, 7), (7, T + 1 + DEPTH))
NORMS = {"mtp.fc_norm": True, "mtp.norm_output": True}
HEADS = {"trunk.qkv_bias": True, "trunk.qk_norm": True}


def one_row():
  tokens = np.random.default_rng(1).integers(0, 40, (1, T + 1 + DEPTH))
  segments = np.repeat([1, 2, 3], [end - start for start, end in DOCUMENTS])
  return batch_of(tokens, segments[None], T)


@functools.partial(jax.jit, static_argnums=0)
def streams(config, params, batch):
  """Returns the embedded tokens and what each block of the trunk makes of them."""
  x_BTD = params["embed"]["embedding"][batch.tokens]
  if config.trunk.kind == "gpt2":
    x_BTD += params["position_embed"]["embedding"][batch.positions]
  found, blocks = [x_BTD], params["trunk"]
  dense = config.trunk.dense_prefix
  for i in range(num_trunk_layers(config)):
    trunk, name, first = config.trunk, "blocks", dense
    if i < dense:
      trunk, name, first = config.trunk.dense(), "dense_blocks", 0
    own = jax.tree.map(operator.itemgetter(i - first), blocks[name])
    x_BTD = Block(trunk).apply(
      {"params": own}, x_BTD, batch.positions, batch.segment_ids
    )[0]
    found.append(x_BTD)
  return found


class Peer:
  """The layer and what is around it in NumPy, float64, one token at a time."""

  def __init__(self, config, params):
    to_float64 = lambda tree: jax.tree.map(np.float64, tree)  # noqa: E731
    self.kind, self.trunk, self.mtp = config.mtp.kind, config.trunk, config.mtp
    self.params, self.final_norm = map(
      to_float64, (params["mtp"], params["final_norm"])
    )

  def norm(self, scales, x):
    if self.trunk.kind == "gpt2":
      x = x - x.mean()
    x = x / np.sqrt(np.mean(x * x) + self.trunk.norm_eps)
    return x * scales["scale"] + scales.get("bias", 0)

  def feature(self, streams):
    """The feature of one position from the streams of all layers there."""
    if self.kind == "eagle":
      return self.norm(self.final_norm, streams[3])
    p, read = self.params["fusion"], streams[1:4]
    if self.mtp.fc_norm:
      read = [self.norm(p[f"norm_{n}"], x) for n, x in enumerate(read)]
    return np.concatenate(read) @ p["kernel"]

  def read_out(self, state):
    is_read = self.kind == "eagle" or self.mtp.norm_output
    return state if is_read else self.norm(self.params["out_norm"], state)

  def step(self, state, embedding, position, memory):
    """Returns the next state; `memory` is the list of (key, value) that it sees."""
    p = self.params["layer"]
    if self.kind == "eagle":
      joined = np.concatenate([state, embedding])
      stream = joined @ p["projection"] + p["projection_bias"]
      read = stream
    else:
      stream = state
      read = np.concatenate(
        [self.norm(p["hidden_norm"], state), self.norm(p["embed_norm"], embedding)]
      )
    stream = stream + self.attend(p["attention"], read, position, memory)
    stream = stream + self.mlp(p["mlp"], self.norm(p["mlp_norm"], stream))
    if self.mtp.norm_output:
      return self.norm(self.params["out_norm"], stream)
    return stream

  def attend(self, p, read, position, memory):
    def heads(name):
      out_NH = np.einsum("d,dnh->nh", read, p[name]) + p.get(f"{name}_bias", 0)
      if name == "value":
        return out_NH
      if self.trunk.qk_norm:
        scale = p[f"{name}_head_norm"]["scale"]
        size = np.sqrt(np.mean(out_NH**2, -1, keepdims=True) + self.trunk.norm_eps)
        out_NH = out_NH / size * scale
      return self.turn(out_NH, position) if self.trunk.kind == "llama" else out_NH

    query = heads("query")
    memory.append((heads("key"), heads("value")))
    out = np.zeros(16) + p.get("out_bias", 0)
    for n, query_H in enumerate(query):
      g = n * self.trunk.num_kv_heads // self.trunk.num_heads
      scores = np.array([key[g] @ query_H for key, _ in memory]) / np.sqrt(len(query_H))
      weights = np.exp(scores - scores.max())
      mixed = sum(
        w * value[g] for w, (_, value) in zip(weights, memory, strict=True)
      )
      out += mixed / weights.sum() @ p["out"][n]
    return out

  def turn(self, x_NH, position):
    half = x_NH.shape[1] // 2
    angle = position * self.trunk.rope_theta ** (-np.arange(half) / half)
    turned = (x_NH[:, :half] + 1j * x_NH[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)

  def mlp(self, p, x):
    if self.trunk.kind == "llama":
      gate = x @ p["gate"]
      return gate / (1 + np.exp(-gate)) * (x @ p["up"]) @ p["down"]
    up = x @ p["up"] + p["up_bias"]
    gelu = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return gelu @ p["down"] + p["down_bias"]

  def draft(self, streams_T, embed, start, i):
    """Yields what is read out in row i of the document from `start` on.

    Runs over the rows up to it, whose features are known, and then on from its own
    output; `embed(j)` is the embedding of token j of the row.
    """
    memory = []
    for j in range(start, i + 1):
      state = self.step(self.feature(streams_T[j]), embed(j + 1), j - start, memory)
    for k in itertools.count(1):
      yield self.read_out(state)
      embedding = embed(i + k + 1)
      if self.kind == "peagle":
        state = self.params["mask_streams"] @ self.params["fusion"]["kernel"]
        embedding = self.params["mask_embedding"]
      state = self.step(state, embedding, i - start + k, memory)


@pytest.mark.parametrize(
  "kind, options",
  [("eagle", {}), ("eagle3", {}), ("peagle", {}), ("eagle3", NORMS)],
  ids=["eagle", "eagle3", "peagle", "eagle3.1"],
)
@pytest.mark.parametrize(
  "trunk",
  mostly_slow([*TRUNKS.values(), HEADS], TRUNKS["llama"]),
  ids=[*TRUNKS, "heads"],
)
def test_training_computes_what_drafting_does_token_by_token(kind, options, trunk):
  config = tiny_config(kind, DEPTH, trunk | options | {"data.seq_len": T})
  params, batch = random_params(config), one_row()
  states_MTD = jax.jit(MtpLm(config).apply)({"params": params}, batch)[:, 0]
  streams_TLD = np.stack(streams(config, params, batch), axis=2)[0].astype(np.float64)
  table_VD = np.float64(params["embed"]["embedding"])
  tokens = np.concatenate([batch.tokens, batch.next_tokens], axis=1)[0]
  peer, compared = Peer(config, params), 0
  for i in range(T):
    start, end = next((s, e) for s, e in DOCUMENTS if s <= i < e)
    np.testing.assert_allclose(
      states_MTD[0, i], peer.norm(peer.final_norm, streams_TLD[i, 3]), 1e-4, 1e-5
    )
    drafted = peer.draft(streams_TLD, lambda j: table_VD[tokens[j]], start, i)
    for k, state_D in zip(range(1, min(DEPTH, end - 2 - i) + 1), drafted, strict=False):
      np.testing.assert_allclose(
        states_MTD[k, i], state_D, 2e-4, 2e-5, err_msg=f"depth {k} at {i}"
      )
      compared += 1
  assert compared == (4 + 3 + 2) + 0 + (7 + 7 + 7)


@pytest.mark.parametrize(
  "options",
  [
    {"trunk.num_layers": 2},
    {"trunk.num_layers": 4, "trunk.scan_layers": False},
    {"trunk.num_layers": 4, "trunk.num_kv_heads": 4} | EXPERTS,
  ],
  ids=["scanned", "unrolled", "experts"],
)
def test_a_trunk_gives_its_streams_after_any_layers(options):
  config = tiny_config("none", 0, options)
  params, batch = random_params(config), packed_batch(config)
  expected = streams(config, params, batch)
  last = num_trunk_layers(config)
  taps = (1, 2, last, 1)
  trunk = Trunk(config.trunk, last, taps)
  residual_BTD, tapped, routing = jax.jit(trunk.apply)(
    {"params": params["trunk"]}, expected[0], batch.positions, batch.segment_ids
  )
  assert (routing is not None) == bool(config.trunk.moe.num_experts)
  np.testing.assert_allclose(residual_BTD, expected[-1], 1e-4, 1e-5)
  for tap, found_BTD in zip(taps, tapped, strict=True):
    np.testing.assert_allclose(found_BTD, expected[tap], 1e-4, 1e-5)


def test_three_layers_are_tapped_whatever_the_size_of_the_trunk():
  def taps(layers, kind="eagle3", **more):
    return tapped_layers(tiny_config(kind, 2, {"trunk.num_layers": layers} | more))

  published = {8: (2, 4, 5), 9: (2, 4, 6), 32: (2, 16, 29)}
  small = {1: (1, 1, 1), 2: (1, 1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 7: (1, 4, 7)}
  for layers, expected in (published | small).items():
    assert taps(layers) == expected
  assert taps(9, **{"mtp.arm": "shortened"}) == published[8]
  assert taps(9, "eagle") == taps(9, "sequential") == ()


@pytest.mark.slow
def test_remat_and_unrolling_change_nothing():
  options = {"trunk.num_layers": 2, "data.seq_len": 8, "data.batch_size": 4}
  config = tiny_config("eagle3", 2, options | {"trunk.remat": "names"})
  plain = with_overrides(config, {"trunk.remat": "none", "trunk.scan_layers": False})
  inputs = random_params(config), microbatches(packed_batch(config))
  weights_M = np.float32([1, 0.5, 0.7])
  assert_trees_close(
    gradient_program(config)(*inputs, weights_M),
    gradient_program(plain)(*inputs, weights_M),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [
  ("eagle", {}), ("eagle3", {}), ("peagle", {}), ("dflash", {}),
  ("medusa", {"mtp.markov_rank": 5}),
])
def test_a_drafter_learns_on_a_frozen_trunk_that_stays_as_it_is(kind, options):
  options = options | {
    "trunk.num_layers": 1, "trunk.remat": "none", "train.freeze_trunk": True,
    "optimizer.warmup_fraction": 0.0,
  }
  config = tiny_config(kind, 2, options)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  batch = microbatches(packed_batch(config))
  hyper = Hyperparameters(*jnp.float32([0.01, 1.0, 100.0]))
  with jax.set_mesh(mesh):
    compiled = programs(program_config(config), mesh)
    state = compiled.init(jnp.int32(0))
    before, losses = jax.device_get(state.params), []
    for _ in range(20):
      state, report = compiled.step(state, batch, hyper, jnp.bool_(True))
      losses.append(jax.device_get(report["loss_M"]))
    after = jax.device_get(state.params)
  for name, tree in after.items():
    is_same = jax.tree.leaves(jax.tree.map(np.array_equal, tree, before[name]))
    assert not any(is_same) if name == "mtp" else all(is_same), name
  assert losses[0][0] == losses[-1][0]
  assert np.all(losses[-1][1:] < losses[0][1:] - 0.1), (losses[0], losses[-1])
