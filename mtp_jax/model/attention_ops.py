"""Document-causal attention: one function, several implementations, one choice.

A token attends to the tokens up to itself that share its segment id. Padding (segment
0) attends to padding, so every row has a key and stays finite. `blocked` is the
flash-attention algorithm (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv
2307.08691) written in plain JAX: it skips the upper triangle and keeps only the output
and the log-sum-exp for the backward pass.

Legend: B batch, T sequence, S keys of a block, N query heads, K kv heads, G = N / K,
H head dim.
"""


import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.sharding import partition_spec

IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn")

# What a rematerialisation policy should save of `attention`, besides its inputs: with
# these the backward pass of `blocked` recomputes scores, never the forward pass.
REMAT_NAMES = ("attention_out", "attention_lse")

_BLOCK = 64
_MAX_BLOCKS = 16  # The blocks are unrolled: bounds compile time at long sequences.


def choose_implementation(
  implementation: str, platform: str, dtype: jnp.dtype, head_dim: int, seq_len: int
) -> str:
  """Returns "xla", "blocked" or "cudnn"; the only place that looks at the platform.

  `auto` is `blocked` on CPU, cuDNN flash attention on GPU where its constraints hold
  (16-bit floats, head size a multiple of 8 up to 128, even length, sequence not split
  over devices), else `xla`.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"trunk.attention must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
      f"got {implementation!r}."
    )
  if implementation != "auto":
    return implementation
  if platform == "cpu":
    return "blocked"
  sixteen_bit = dtype in (jnp.bfloat16, jnp.float16)
  fits = sixteen_bit and head_dim % 8 == 0 and head_dim <= 128 and seq_len % 2 == 0
  if platform in ("gpu", "cuda") and fits and not _sequence_is_split():
    return "cudnn"
  return "xla"


def attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segment_ids_BT: jax.Array,
  *,
  implementation: str,
) -> jax.Array:
  """Returns out_BTNH: softmax(q k^T / sqrt(H)) v over earlier tokens of the document.

  Query head n uses key head n // (N / K). Softmax is in float32 (float64 for float64
  input); the result has the dtype of the query.

  Raises:
    ValueError: unknown implementation, or N not a multiple of K.
  """
  _, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  if N % K:
    raise ValueError(
      f"trunk.num_heads must be a multiple of trunk.num_kv_heads, got {N} and {K}."
    )
  chosen = choose_implementation(
    implementation, jax.default_backend(), q_BTNH.dtype, H, T
  )
  if chosen == "cudnn":
    # cuDNN takes the document mask as a bias, [B, 1, T, T] in the compute dtype.
    same_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, mask=same_B1TT, is_causal=True, implementation="cudnn"
    )
  out_BKGTH = (_blocked if chosen == "blocked" else _plain)(
    q_BTNH.reshape(*q_BTNH.shape[:2], K, N // K, H).transpose(0, 2, 3, 1, 4),
    k_BTKH.transpose(0, 2, 1, 3),
    v_BTKH.transpose(0, 2, 1, 3),
    segment_ids_BT,
  )
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _plain(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
  # jax.nn.dot_product_attention rounds float64 scores to float32, hence not used.
  weights = jax.nn.softmax(_scores(q_BKGTH, k_BKSH, segments_BT, 0), axis=-1)
  out = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)
  return out.astype(q_BKGTH.dtype)


@jax.custom_vjp
def _blocked(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
  return _blocked_fwd(q_BKGTH, k_BKSH, v_BKSH, segments_BT)[0]


def _blocked_fwd(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
  outs, lses = [], []
  for start, end in _blocks(q_BKGTH.shape[3]):
    q = q_BKGTH[:, :, :, start:end]
    k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
    scores = _scores(q, k, segments_BT, start)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v) / total
    outs.append(out.astype(q.dtype))
    lses.append(top + jnp.log(total))
  out_BKGTH = checkpoint_name(jnp.concatenate(outs, axis=3), "attention_out")
  lse_BKGT1 = checkpoint_name(jnp.concatenate(lses, axis=3), "attention_lse")
  return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, lse_BKGT1)


def _blocked_bwd(saved, d_out_BKGTH):
  q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, lse_BKGT1 = saved
  wide = lse_BKGT1.dtype
  scale = q_BKGTH.shape[-1] ** -0.5
  # Row sums of weights * d_weights, from the output alone (Dao 2023, section 2.3).
  delta_BKGT1 = jnp.sum(
    d_out_BKGTH.astype(wide) * out_BKGTH.astype(wide), axis=-1, keepdims=True
  )
  length = q_BKGTH.shape[3]
  d_q = []
  d_k = jnp.zeros(k_BKSH.shape, wide)
  d_v = jnp.zeros(v_BKSH.shape, wide)
  for start, end in _blocks(length):
    rows = (slice(None), slice(None), slice(None), slice(start, end))
    q, d_out = q_BKGTH[rows], d_out_BKGTH[rows]
    k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
    weights = jnp.exp(_scores(q, k, segments_BT, start) - lse_BKGT1[rows])
    d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out, v)
    d_scores = (weights * (d_weights - delta_BKGT1[rows]) * scale).astype(q.dtype)
    weights = weights.astype(q.dtype)
    d_q.append(_einsum("BKGTS,BKSH->BKGTH", d_scores, k).astype(q.dtype))
    d_k = d_k.at[:, :, :end].add(_einsum("BKGTS,BKGTH->BKSH", d_scores, q))
    d_v = d_v.at[:, :, :end].add(_einsum("BKGTS,BKGTH->BKSH", weights, d_out))
  d_q_BKGTH = jnp.concatenate(d_q, axis=3)
  return d_q_BKGTH, d_k.astype(k_BKSH.dtype), d_v.astype(v_BKSH.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _scores(q_BKGTH, k_BKSH, segments_BT, start):
  """Scaled scores of queries `start`.. against all keys given; masked ones are huge."""
  T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
  scores = _einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH) * q_BKGTH.shape[-1] ** -0.5
  rows_T1 = start + jnp.arange(T)[:, None]
  causal_TS = jnp.arange(S)[None, :] <= rows_T1
  same_BTS = segments_BT[:, start : start + T, None] == segments_BT[:, None, :S]
  mask = (same_BTS & causal_TS)[:, None, None]
  return jnp.where(mask, scores, jnp.finfo(scores.dtype).min / 2)


def _einsum(equation, a, b):
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _blocks(length: int) -> list[tuple[int, int]]:
  size = max(_BLOCK, -(-length // (_MAX_BLOCKS * _BLOCK)) * _BLOCK)
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _sequence_is_split() -> bool:
  """Whether the mesh in use puts the sequence on more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  axis = partition_spec(("seq",))[0]
  return not mesh.empty and axis is not None and mesh.shape[axis] > 1
