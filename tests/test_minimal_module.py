"""The minimal multi-token prediction code, in plain PyTorch, and the config that is it.

For a trunk's hidden state h_0 and depths k = 1 ... D,

  h_k = Block_k(W_k [RMSNorm(h_{k-1}); RMSNorm(Emb(t_{i+k}))])
  L_k = mean over the T - k positions with a target of CE(Unembed(h_k), t_{i+k+1})
  loss = main + lambda * sum_k L_k

without a norm between a block and the unembedding, with RMSNorm on any trunk, and
without a division by D. Nothing of mtp_jax computes here; weights come as its tree.

Legend: B batch, T tokens of a row, D embed, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.depth_weights import depth_weights
from mtp_jax.train_step import loss_and_grads
from tests import common

torch = pytest.importorskip("torch", reason="the reference needs torch")
F = torch.nn.functional

ROWS, LENGTH, DEPTH = 3, 12, 3
LAMBDA = 0.375  # Exact in float32, in which schedules are computed.
EPS = 1e-6


def rms_norm(p, x):
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * p["scale"]


def trunk_norm(p, x):
  if "bias" not in p:
    return rms_norm(p, x)
  return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], EPS)


def rotate(x_BTNH):
  """Rotary embedding of the pairs (h, h + H / 2) at positions 0 ... T - 1."""
  half = x_BTNH.shape[-1] // 2
  places_T11 = torch.arange(x_BTNH.shape[1], dtype=x_BTNH.dtype)[:, None, None]
  angles = places_T11 / 10_000 ** (torch.arange(half, dtype=x_BTNH.dtype) / half)
  a, b = x_BTNH.split(half, -1)
  cos, sin = angles.cos(), angles.sin()
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(p, x_BTD):
  parts = []
  for name in ("query", "key", "value"):
    part_BTNH = torch.einsum("btd,dnh->btnh", x_BTD, p[name])
    parts.append(part_BTNH + p.get(f"{name}_bias", 0))
  q_BTNH, k_BTKH, v_BTKH = parts
  if "query_bias" not in p:
    q_BTNH, k_BTKH = rotate(q_BTNH), rotate(k_BTKH)
  group, length = q_BTNH.shape[2] // k_BTKH.shape[2], x_BTD.shape[1]
  k_BTNH, v_BTNH = (x.repeat_interleave(group, 2) for x in (k_BTKH, v_BTKH))
  scores = torch.einsum("bqnh,bknh->bnqk", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
  later = torch.ones(length, length, dtype=torch.bool).triu(1)
  weights = scores.masked_fill(later, -torch.inf).softmax(-1)
  mixed_BTNH = torch.einsum("bnqk,bknh->bqnh", weights, v_BTNH)
  return torch.einsum("btnh,nhd->btd", mixed_BTNH, p["out"]) + p.get("out_bias", 0)


def mlp(p, x):
  if "gate" in p:
    return (F.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
  inner = F.gelu(x @ p["up"] + p["up_bias"], approximate="tanh")
  return inner @ p["down"] + p["down_bias"]


def block(p, x):
  x = x + attention(p["attention"], trunk_norm(p["attention_norm"], x))
  return x + mlp(p["mlp"], trunk_norm(p["mlp_norm"], x))


def layer(tree, i):
  if isinstance(tree, dict):
    return {name: layer(x, i) for name, x in tree.items()}
  return tree[i]


def minimal_losses(params, tokens, num_layers, h_is_normed):
  """Returns the D + 1 mean losses of documents of T + 1 tokens, [B, T + 1]."""
  table = params["embed"]["embedding"]
  unembed = params["unembed"]["kernel"] if "unembed" in params else table.T
  length = tokens.shape[1] - 1

  def mean_loss(h, ahead):
    targets = tokens[:, ahead : ahead + h.shape[1]]
    assert ahead + h.shape[1] == 1 + length
    return F.cross_entropy((h @ unembed).flatten(0, 1), targets.flatten())

  x = table[tokens[:, :length]]
  if "position_embed" in params:
    x = x + params["position_embed"]["embedding"][:length]
  for i in range(num_layers):
    x = block(layer(params["trunk"]["blocks"], i), x)
  normed = trunk_norm(params["final_norm"], x)
  losses, h = [mean_loss(normed, 1)], normed if h_is_normed else x
  for k in range(1, 1 + DEPTH):
    p = layer(params["mtp"]["modules"], k - 1)
    places = length - k  # Positions i whose target t_{i+k+1} is there.
    joined = torch.cat([
      rms_norm(p["hidden_norm"], h[:, :places]),
      rms_norm(p["embed_norm"], table[tokens[:, k : k + places]]),
    ], -1)
    h = block(p["block"], joined @ p["projection"])
    losses.append(mean_loss(h, 1 + k))
  return torch.stack(losses)


@pytest.mark.parametrize("trunk, hidden_norm", common.mostly_slow(
  [("llama", "before"), ("gpt2", "after")], ("gpt2", "after")
))
def test_a_config_is_the_minimal_code(trunk, hidden_norm):
  config = common.tiny_config("sequential", DEPTH, common.TRUNKS[trunk] | {
    "mtp.out_norm": "none",
    "mtp.norm": "rms",
    "mtp.weighting": "sum",
    "mtp.weight": LAMBDA,
    "mtp.hidden_norm": hidden_norm,
    "trunk.compute_dtype": "float64",
    "data.seq_len": LENGTH,
    "data.batch_size": ROWS,
  })
  assert config.trunk.norm_eps == EPS
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, common.VOCAB, (ROWS, LENGTH + 1))
  # Every document ends with its row: its last token is a target alone.
  after = np.zeros((ROWS, DEPTH), int)
  batch = common.batch_of(
    np.concatenate([tokens, after], 1),
    np.concatenate([np.ones_like(tokens), after], 1),
    LENGTH,
  )
  with jax.enable_x64(True):
    params = jax.tree.map(
      lambda x: np.asarray(x, np.float64), common.random_params(config)
    )
    weights_M = depth_weights(config.mtp, config.mtp.weight, 0.0)[0].astype(jnp.float64)
    step = jax.jit(lambda p, b: loss_and_grads(config, p, b, weights_M))
    sums, counts_M, grads = step(params, common.microbatches(batch))
    losses_M, total = np.asarray(sums.nll_M / counts_M), float(sums.total)
    grads = jax.tree.map(np.asarray, grads)
  assert counts_M.tolist() == [ROWS * (LENGTH - k) for k in range(1 + DEPTH)]

  weights = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), params)
  expected_M = minimal_losses(
    weights, torch.tensor(tokens), config.trunk.num_layers, hidden_norm == "after"
  )
  expected = expected_M[0] + LAMBDA * expected_M[1:].sum()
  expected.backward()
  np.testing.assert_allclose(losses_M, expected_M.detach().numpy(), rtol=1e-12)
  np.testing.assert_allclose(total, expected.item(), rtol=1e-12)
  found = jax.tree_util.tree_leaves_with_path(grads)
  for (path, grad), weight in zip(found, jax.tree.leaves(weights), strict=True):
    reference = weight.grad.numpy()
    # A bias of keys moves no softmax: its gradient is 0, and rounded.
    scale = max(np.abs(reference).max(), 1e-3)
    np.testing.assert_allclose(
      grad, reference, rtol=0, atol=1e-12 * scale, err_msg=jax.tree_util.keystr(path)
    )
