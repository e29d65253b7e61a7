"""Document-causal attention: one function, several implementations, one choice.

A token attends to the tokens up to itself that share its segment id. Padding (segment
0) attends to padding, so every row has a key and stays finite. `blocked` is the
flash-attention algorithm (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv
2307.08691) written in plain JAX: it skips the upper triangle and keeps only the output
and the log-sum-exp for the backward pass. `cudnn` takes the documents as a mask, [B, 1,
T, T]; `cudnn_packed` takes the place of each document, and skips what the mask hides.

Legend: B batch, T sequence, S keys of a block, N query heads, G kv heads, P = N / G
H head dim of queries and keys, V head dim of values, J later steps of an unrolled
layer, M documents of a row at most.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.sharding import device_kind, partition_spec, platform

IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn", "cudnn_packed", "tokamax")

# Names that a rematerialisation policy should save besides the inputs of `attention`:
# the backward pass of `blocked` then recomputes scores, but not the forward pass.
REMAT_NAMES = ("attention_out", "attention_lse")

# Of cuDNN, on the GPUs that allow most; see `largest_head`.
LARGEST_HEAD = 256
# M of `cudnn_packed`: the log-sum-exp takes B M N T floats.
MOST_DOCUMENTS = 32

_BLOCK = 64
_MAX_BLOCKS = 16  # The blocks are unrolled: bounds compile time at long sequences.


def choose_implementation(
  implementation: str,
  platform: str,
  dtype: jnp.dtype,
  head_dim: int,
  seq_len: int,
  value_dim: int | None = None,
) -> str:
  """Returns the implementation to use, one of `IMPLEMENTATIONS` other than `auto`.

  `auto` becomes `blocked` on CPU, cuDNN flash attention on GPU where its constraints
  hold (16-bit floats, heads up to `largest_head`, even length, sequence not split over
  devices), else `xla`. Others must be named. `value_dim` is `head_dim` unless given.

  Raises:
    ValueError: an unknown implementation; cuDNN with heads that are too large, or with
      places of documents where it has none; tokamax where it is not installed or on
      several devices.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"trunk.attention must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
      f"got {implementation!r}."
    )
  size = padded_head(head_dim, value_dim or head_dim)
  if implementation.startswith("cudnn") and size > largest_head():
    raise ValueError(
      f"trunk.attention must not be {implementation!r} with heads above "
      f"{largest_head()} on {device_kind()}, got heads of {size}."
    )
  if implementation == "cudnn_packed" and not takes_documents():
    raise ValueError(
      "trunk.attention must not be 'cudnn_packed' before Hopper, nor with a JAX that "
      f"misplaces the keys of documents, got {device_kind()} and JAX {jax.__version__}."
    )
  if implementation == "tokamax":
    if importlib.util.find_spec("tokamax") is None:
      raise ValueError(
        "trunk.attention must not be 'tokamax' where the package tokamax is not "
        "installed."
      )
    # The compiler cannot split tokamax' kernels over devices.
    if (count := jax.sharding.get_abstract_mesh().size) > 1:
      raise ValueError(
        "trunk.attention must not be 'tokamax' on several devices, got a mesh of "
        f"{count}."
      )
  if implementation != "auto":
    return implementation
  if platform == "cpu":
    return "blocked"
  sixteen_bit = dtype in (jnp.bfloat16, jnp.float16)
  fits = sixteen_bit and size <= largest_head() and seq_len % 2 == 0
  if platform in ("gpu", "cuda") and fits and not _sequence_is_split():
    return "cudnn"
  return "xla"


def largest_head() -> int:
  """Returns the largest head of cuDNN's attention, forward and backward.

  256 on Hopper, 128 on other GPUs (support matrix of cuDNN 9.18; JAX checks the same
  for Hopper). A GPU of this generation has H and its number in its name.
  """
  is_hopper = re.search(r"\bG?H\d{2,3}\b", device_kind())
  return LARGEST_HEAD if is_hopper else 128


def takes_documents() -> bool:
  """Returns whether cuDNN's attention takes the places of documents here."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  return cudnn.check_compute_capability("9.0") and places_keys()


@functools.cache
def places_keys() -> bool:
  """Returns whether this JAX places the keys of documents where they are.

  Versions before 0.12 place them by the number of query heads, and so multiply queries
  that share keys by the keys of other documents (github.com/jax-ml/jax/pull/39521).
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  # Two documents of two tokens; two query heads share one key head, of one number.
  lengths_BM, starts_BX = np.int32([[2, 2]]), np.int32([[0, 2, -1]])
  q_BTNH, k_BTGH = np.zeros((1, 4, 2, 1)), np.zeros((1, 4, 1, 1))
  with jax.ensure_compile_time_eval():
    *_, places = cudnn._fix_seqlen_offsets(
      lengths_BM, lengths_BM, starts_BX, starts_BX, q_BTNH, k_BTGH
    )
  return np.ravel(places).tolist() == [0, 2, 4]


def padded_head(head_dim: int, value_dim: int) -> int:
  """Returns the size to which cuDNN's heads are padded, a multiple of 8."""
  return -(-max(head_dim, value_dim) // 8) * 8


def with_padded_heads(
  kernel: Callable[..., jax.Array], *qkv: jax.Array, size: int
) -> jax.Array:
  """Returns kernel(q, k, v) of heads padded to `size` with zeros, which add nothing."""
  padded = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in qkv)
  return kernel(*padded)[..., : qkv[2].shape[-1]]


def attention(
  q_BTNH: jax.Array,
  k_BTGH: jax.Array,
  v_BTGV: jax.Array,
  segment_ids_BT: jax.Array,
  *,
  implementation: str,
  scale: float | None = None,
) -> jax.Array:
  """Returns out_BTNV: softmax(scale q k^T) v over earlier tokens of the document.

  Query head n uses key head n // P. `scale` is 1 / sqrt(H) unless given. Softmax
  is in float32 (float64 for float64 input); the result has the dtype of the query.

  Raises:
    ValueError: N not a multiple of G, or as `choose_implementation`.
  """
  _, T, N, H = q_BTNH.shape
  G = k_BTGH.shape[2]
  if N % G:
    raise ValueError(
      f"trunk.num_heads must be a multiple of trunk.num_kv_heads, got {N} and {G}."
    )
  # The choice is made at trace time, so a program has one implementation.
  chosen = choose_implementation(
    implementation, platform(), q_BTNH.dtype, H, T, v_BTGV.shape[-1]
  )
  scale = H**-0.5 if scale is None else scale
  # JAX offers one size for keys and values.
  size = padded_head(H, v_BTGV.shape[-1])
  if chosen == "cudnn_packed":
    kernel = functools.partial(_packed, segment_ids_BT=segment_ids_BT, scale=scale)
    return with_padded_heads(kernel, q_BTNH, k_BTGH, v_BTGV, size=size)
  if chosen in ("cudnn", "tokamax"):
    # cuDNN takes the document mask as a bias, [B, 1, T, T] in the compute dtype.
    same_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    kernel = (
      import_tokamax().dot_product_attention if chosen == "tokamax" else
      functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    )
    kernel = functools.partial(kernel, mask=same_B1TT, is_causal=True, scale=scale)
    if chosen == "tokamax":
      return kernel(q_BTNH, k_BTGH, v_BTGV)
    return with_padded_heads(kernel, q_BTNH, k_BTGH, v_BTGV, size=size)
  out_BGPTV = (_blocked if chosen == "blocked" else _plain)(
    _by_kv_head(q_BTNH, G),
    k_BTGH.transpose(0, 2, 1, 3),
    v_BTGV.transpose(0, 2, 1, 3),
    segment_ids_BT,
    scale,
  )
  return _by_token(out_BGPTV)


def documents(
  segment_ids_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns lengths_BM, starts_BX and fits_B of the documents of each row, X = M + 1.

  A document is a run of equal ids, padding too. Where a row has fewer than M, lengths
  and starts are -1, and the last start always is. `fits_B`: the row has no more than M.
  """
  T = segment_ids_BT.shape[1]
  is_first_BT = segment_ids_BT != jnp.pad(
    segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1
  )
  find = functools.partial(jnp.flatnonzero, size=MOST_DOCUMENTS + 1, fill_value=T)
  starts_BX = jax.vmap(find)(is_first_BT).astype(jnp.int32)
  is_there_BX = (starts_BX < T) & (jnp.arange(MOST_DOCUMENTS + 1) < MOST_DOCUMENTS)
  lengths_BM = jnp.where(is_there_BX[:, :-1], jnp.diff(starts_BX, axis=1), -1)
  return lengths_BM, jnp.where(is_there_BX, starts_BX, -1), starts_BX[:, -1] == T


def _packed(q_BTNH, k_BTGH, v_BTGH, segment_ids_BT, scale):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  lengths_BM, starts_BX, fits_B = documents(segment_ids_BT)
  # The tokens behind the last place would have no output: nan shows it in the loss.
  missing_B = jnp.where(fits_B, 0, jnp.nan).astype(q_BTNH.dtype)
  return cudnn.dot_product_attention(
    q_BTNH + missing_B[:, None, None, None], k_BTGH, v_BTGH,
    q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=starts_BX,
    kv_offsets=starts_BX, scale=scale, mask_type=cudnn.MaskType.PADDING_CAUSAL,
  )


def import_tokamax() -> Any:
  """Returns the optional package, whose functions choose their kernels themselves."""
  import tokamax
  from absl import flags, logging

  if not flags.FLAGS.is_parsed():
    # tokamax would otherwise parse the command line, which belongs to the caller.
    flags.FLAGS.mark_as_parsed()
  # It writes a page of text for every product that nobody tuned.
  logging.get_absl_logger().addFilter(_is_not_of_tuning)
  return tokamax


def _is_not_of_tuning(record: Any) -> bool:
  return not str(record.msg).startswith("Autotuning cache miss")


def unrolled_attention(
  q_BTNH: jax.Array,
  keys: tuple[jax.Array, ...],
  values: tuple[jax.Array, ...],
  segment_ids_BT: jax.Array,
) -> jax.Array:
  """Returns out_BTNH of a later step of a layer that is applied to its own output.

  `keys` and `values` hold one [B, T, G, H] array per step so far. Token i attends, in
  one softmax, to the keys of the first step that it sees in `attention`, and to the one
  key at place i of every later step. Dtypes and scale are as in `attention`.
  """
  (first_BTGH, *own_k), (value_BTGH, *own_v) = keys, values
  T, G, H = first_BTGH.shape[1:]
  own_JBTGH, own_value_JBTGH = jnp.stack(own_k), jnp.stack(own_v)
  q_BGPTH = _by_kv_head(q_BTNH, G)
  scale = H**-0.5
  scores_BGPTS = _scores(
    q_BGPTH, first_BTGH.transpose(0, 2, 1, 3), segment_ids_BT, 0, scale
  )
  own_BGPTJ = _einsum("BGPTH,JBTGH->BGPTJ", q_BGPTH, own_JBTGH) * scale
  weights = jax.nn.softmax(jnp.concatenate([scores_BGPTS, own_BGPTJ], -1), axis=-1)
  weights_BGPTS, weights_BGPTJ = jnp.split(weights.astype(q_BTNH.dtype), [T], axis=-1)
  out_BGPTH = _einsum("BGPTS,BSGH->BGPTH", weights_BGPTS, value_BTGH)
  out_BGPTH += _einsum("BGPTJ,JBTGH->BGPTH", weights_BGPTJ, own_value_JBTGH)
  return _by_token(out_BGPTH.astype(q_BTNH.dtype))


def _by_kv_head(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
  """Returns q_BGPTH."""
  B, T, N, H = q_BTNH.shape
  split = q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
  return split.transpose(0, 2, 3, 1, 4)


def _by_token(out_BGPTV: jax.Array) -> jax.Array:
  """Returns out_BTNV."""
  B, G, P, T, V = out_BGPTV.shape
  return out_BGPTV.transpose(0, 3, 1, 2, 4).reshape(B, T, G * P, V)


def _plain(q_BGPTH, k_BGSH, v_BGSV, segments_BT, scale):
  # jax.nn.dot_product_attention rounds float64 scores to float32, hence not used.
  weights = jax.nn.softmax(_scores(q_BGPTH, k_BGSH, segments_BT, 0, scale), axis=-1)
  out = _einsum("BGPTS,BGSV->BGPTV", weights.astype(v_BGSV.dtype), v_BGSV)
  return out.astype(q_BGPTH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q_BGPTH, k_BGSH, v_BGSV, segments_BT, scale):
  return _blocked_fwd(q_BGPTH, k_BGSH, v_BGSV, segments_BT, scale)[0]


def _blocked_fwd(q_BGPTH, k_BGSH, v_BGSV, segments_BT, scale):
  outs, lses = [], []
  for start, end in _blocks(q_BGPTH.shape[3]):
    q = q_BGPTH[:, :, :, start:end]
    k, v = k_BGSH[:, :, :end], v_BGSV[:, :, :end]
    scores = _scores(q, k, segments_BT, start, scale)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _einsum("BGPTS,BGSV->BGPTV", weights.astype(v.dtype), v) / total
    outs.append(out.astype(q.dtype))
    lses.append(top + jnp.log(total))
  out_BGPTV = checkpoint_name(jnp.concatenate(outs, axis=3), "attention_out")
  lse_BGPT1 = checkpoint_name(jnp.concatenate(lses, axis=3), "attention_lse")
  return out_BGPTV, (q_BGPTH, k_BGSH, v_BGSV, segments_BT, out_BGPTV, lse_BGPT1)


def _blocked_bwd(scale, saved, d_out_BGPTV):
  q_BGPTH, k_BGSH, v_BGSV, segments_BT, out_BGPTV, lse_BGPT1 = saved
  # Gradients of keys and values are sums over blocks, hence kept in the wide dtype.
  wide = lse_BGPT1.dtype
  # Row sums of weights * d_weights, from the output alone (Dao 2023, section 2.3).
  delta_BGPT1 = jnp.sum(
    d_out_BGPTV.astype(wide) * out_BGPTV.astype(wide), axis=-1, keepdims=True
  )
  length = q_BGPTH.shape[3]
  d_q = []
  d_k = jnp.zeros(k_BGSH.shape, wide)
  d_v = jnp.zeros(v_BGSV.shape, wide)
  for start, end in _blocks(length):
    rows = (slice(None), slice(None), slice(None), slice(start, end))
    q, d_out = q_BGPTH[rows], d_out_BGPTV[rows]
    k, v = k_BGSH[:, :, :end], v_BGSV[:, :, :end]
    # The forward pass saved only the log-sum-exp: weights are computed again from it.
    weights = jnp.exp(_scores(q, k, segments_BT, start, scale) - lse_BGPT1[rows])
    d_weights = _einsum("BGPTV,BGSV->BGPTS", d_out, v)
    d_scores = (weights * (d_weights - delta_BGPT1[rows]) * scale).astype(q.dtype)
    weights = weights.astype(q.dtype)
    d_q.append(_einsum("BGPTS,BGSH->BGPTH", d_scores, k).astype(q.dtype))
    d_k = d_k.at[:, :, :end].add(_einsum("BGPTS,BGPTH->BGSH", d_scores, q))
    d_v = d_v.at[:, :, :end].add(_einsum("BGPTS,BGPTV->BGSV", weights, d_out))
  d_q_BGPTH = jnp.concatenate(d_q, axis=3)
  return d_q_BGPTH, d_k.astype(k_BGSH.dtype), d_v.astype(v_BGSV.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _scores(q_BGPTH, k_BGSH, segments_BT, start, scale):
  """Returns scaled scores of the queries from `start` on; masked ones are very low."""
  T, S = q_BGPTH.shape[3], k_BGSH.shape[2]
  scores = _einsum("BGPTH,BGSH->BGPTS", q_BGPTH, k_BGSH) * scale
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
  """Returns whether the mesh in use splits the sequence over devices."""
  mesh = jax.sharding.get_abstract_mesh()
  axis = partition_spec(("seq",))[0]
  return not mesh.empty and axis is not None and mesh.shape[axis] > 1
