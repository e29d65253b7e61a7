"""Every implementation of attention is the same function; the choice follows rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mtp_jax.config import MeshConfig
from mtp_jax.kernels import attention as kernels
from mtp_jax.kernels.attention import attention, choose_implementation
from mtp_jax.sharding import make_mesh


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 4 tokens, so that short rows have several."""
  monkeypatch.setattr(kernels, "_BLOCK", 4)


def _inputs(T: int, N: int, K: int, dtype=np.float64, V: int = 8):
  """Random q, k, v, d_out and documents of 1 to 6 tokens, the last row half padding."""
  rng = np.random.default_rng(T)
  B, H = 3, 8
  shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V)]
  arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  ends = np.cumsum(rng.integers(1, 7, (B, T)), axis=1)
  segments = 1 + np.stack([np.searchsorted(e, np.arange(T), "right") for e in ends])
  segments[-1, T // 2 :] = 0
  return arrays, jnp.asarray(segments, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _value_and_grads(implementation, arrays, segments, scale=None):
  def attend(q, k, v):
    return attention(q, k, v, segments, implementation=implementation, scale=scale)

  q, k, v, d_out = arrays
  out, pullback = jax.vjp(attend, q, k, v)
  return out, *pullback(d_out)


def _loops(arrays, segments, scale=8**-0.5):
  """The definition, one query at a time."""
  q, k, v, _ = (np.asarray(x) for x in arrays)
  segments = np.asarray(segments)
  B, T, N, _ = q.shape
  group = N // k.shape[2]
  out = np.zeros((B, T, N, v.shape[-1]))
  for b, t, n in np.ndindex(B, T, N):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    scores = scale * k[b, seen, n // group] @ q[b, t, n]
    weights = np.exp(scores - scores.max())
    out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // group]
  return out


def test_plain_attention_is_the_definition():
  with jax.enable_x64(True):
    arrays, segments = _inputs(9, 4, 2)
    out = attention(*arrays[:3], segments, implementation="xla")
    np.testing.assert_allclose(out, _loops(arrays, segments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("V", [3, 12])
def test_values_of_another_size_and_a_scale(small_blocks, V):
  with jax.enable_x64(True):
    arrays, segments = _inputs(9, 4, 2, V=V)
    plain = _value_and_grads("xla", arrays, segments, 0.7)
    expected = _loops(arrays, segments, 0.7)
    np.testing.assert_allclose(plain[0], expected, rtol=1e-12, atol=1e-12)
    blocked = _value_and_grads("blocked", arrays, segments, 0.7)
    for name, a, b in zip(("out", "q", "k", "v"), blocked, plain, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("T, N, K", [(12, 2, 2), (11, 4, 2), (3, 4, 1), (70, 2, 1)])
def test_blocked_equals_plain(small_blocks, T, N, K):
  with jax.enable_x64(True):
    arrays, segments = _inputs(T, N, K)
    blocked = _value_and_grads("blocked", arrays, segments)
    plain = _value_and_grads("xla", arrays, segments)
    for name, a, b in zip(("out", "q", "k", "v"), blocked, plain, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=name)


def test_blocked_works_under_vmap(small_blocks):
  with jax.enable_x64(True):
    (q, k, v, _), segments = _inputs(10, 4, 2)
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]

    def loss(q, k, v, implementation):
      out = attention(q, k, v, segments, implementation=implementation)
      return jnp.sum(out**2)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(implementation, q, k, v):
      one = lambda *x: jax.grad(loss, (0, 1, 2))(*x, implementation)  # noqa: E731
      return jax.vmap(one)(q, k, v)

    for a, b in zip(grads("blocked", *stacked), grads("xla", *stacked), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_bfloat16_keeps_its_dtype_and_stays_near_float32(small_blocks):
  arrays, segments = _inputs(18, 4, 2, np.float32)
  expected = _value_and_grads("xla", arrays, segments)
  half = [x.astype(jnp.bfloat16) for x in arrays]
  for implementation in ("blocked", "xla"):
    found = _value_and_grads(implementation, half, segments)
    for a, b in zip(found, expected, strict=True):
      assert a.dtype == jnp.bfloat16
      # bfloat16 has 8 bits of mantissa; inputs, weights and results are rounded to it.
      np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.05, atol=0.05)


def test_tokamax_is_the_same_function():
  pytest.importorskip("tokamax", reason="the kernels of this optional package")
  arrays, segments = _inputs(18, 4, 2, np.float32)
  expected = _value_and_grads("xla", arrays, segments, 0.4)
  found = _value_and_grads("tokamax", arrays, segments, 0.4)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_tokamax_is_refused_where_it_cannot_work(monkeypatch):
  arguments = ("tokamax", "cpu", jnp.float32, 64, 256)
  with monkeypatch.context() as patch:
    patch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'tokamax' where the package tokamax is not"):
      choose_implementation(*arguments)
  monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
  assert choose_implementation(*arguments) == "tokamax"
  config = MeshConfig(data=-1, fsdp=1, expert=1, tensor=1, context=1)
  with (
    jax.set_mesh(make_mesh(config)),
    pytest.raises(ValueError, match="'tokamax' on several devices, got a mesh of 8"),
  ):
    choose_implementation(*arguments)


def test_blocks_cover_the_row_and_are_bounded_in_number():
  for length in (1, 63, 64, 65, 1024, 1025, 5000):
    blocks = kernels._blocks(length)
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == length
    assert len(blocks) <= kernels._MAX_BLOCKS


def test_heads_that_do_not_divide_are_refused():
  (q, k, v, _), segments = _inputs(4, 4, 2, np.float32)
  with pytest.raises(ValueError, match=r"num_heads must be a multiple.*got 3 and 2"):
    attention(q[:, :, :3], k, v, segments, implementation="xla")


@pytest.mark.parametrize(
  "platform, dtype, head_dim, seq_len, expected",
  [
    ("cpu", jnp.float32, 64, 256, "blocked"),
    ("gpu", jnp.bfloat16, 64, 256, "cudnn"),
    ("cuda", jnp.float16, 128, 256, "cudnn"),
    ("gpu", jnp.float32, 64, 256, "xla"),
    ("gpu", jnp.bfloat16, 60, 256, "cudnn"),
    ("gpu", jnp.bfloat16, 130, 256, "xla"),
    ("gpu", jnp.bfloat16, 64, 255, "xla"),
    ("tpu", jnp.bfloat16, 64, 256, "xla"),
  ],
)
def test_automatic_choice(platform, dtype, head_dim, seq_len, expected):
  assert choose_implementation("auto", platform, dtype, head_dim, seq_len) == expected


def test_cudnn_is_not_chosen_where_the_sequence_is_split():
  arguments = ("auto", "gpu", jnp.bfloat16, 64, 256)
  for context, expected in ((1, "cudnn"), (2, "xla")):
    config = MeshConfig(data=-1, fsdp=1, expert=1, tensor=1, context=context)
    with jax.set_mesh(make_mesh(config)):
      assert choose_implementation(*arguments) == expected


@pytest.mark.parametrize(
  "kind, heads, expected",
  [
    ("NVIDIA H200", (192, 128), "cudnn"),
    ("NVIDIA GH200 480GB", (256, 256), "cudnn"),
    ("NVIDIA H100 80GB HBM3", (257, 64), "xla"),
    ("NVIDIA A100-SXM4-80GB", (128, 128), "cudnn"),
    ("NVIDIA A100-SXM4-80GB", (192, 128), "xla"),
    ("NVIDIA B200", (64, 136), "xla"),
    ("NVIDIA L40", (96, 128), "cudnn"),
  ],
)
def test_large_heads_have_cudnn_on_hopper(kind, heads, expected, monkeypatch):
  monkeypatch.setattr(kernels, "device_kind", lambda: kind)
  key, value = heads
  arguments = ("gpu", jnp.bfloat16, key, 256, value)
  assert choose_implementation("auto", *arguments) == expected
  if expected == "cudnn":
    assert choose_implementation("cudnn", *arguments) == "cudnn"
  else:
    with pytest.raises(ValueError, match=rf"'cudnn' with heads above \d+ on {kind}"):
      choose_implementation("cudnn", *arguments)


@pytest.mark.parametrize(("key", "value"), [(8, 3), (5, 5), (7, 12)])
def test_heads_are_padded_for_cudnn(key, value, monkeypatch):
  """As cuDNN is called, but computed by XLA: the padding changes nothing."""
  arrays, segments = _inputs(18, 4, 2, np.float32, V=value)
  arrays = [arrays[0][..., :key], arrays[1][..., :key], *arrays[2:]]
  expected = _value_and_grads("xla", arrays, segments, 0.4)
  plain, calls = jax.nn.dot_product_attention, []

  def by_xla(q, k, v, *, implementation, **options):
    calls.append((implementation, *(x.shape[-1] for x in (q, k, v))))
    return plain(q, k, v, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  _value_and_grads.clear_cache()
  found = _value_and_grads("cudnn", arrays, segments, 0.4)
  size = 16 if value > 8 else 8
  assert calls == [("cudnn", size, size, size)]
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def _by_places(
  q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type
):
  """What cuDNN promises: each document of a row attends to itself, up to each token."""
  assert mask_type.name == "PADDING_CAUSAL" and q_offsets.shape[1] == 1 + (
    q_seqlen.shape[1]
  )
  assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
  at_T = jnp.arange(q.shape[1])

  def document_of(starts_X, lengths_M):
    begin_M1, end_M1 = starts_X[:-1, None], (starts_X[:-1] + lengths_M)[:, None]
    is_in_MT = (begin_M1 >= 0) & (begin_M1 <= at_T) & (at_T < end_M1)
    # Where no document is, there is no output.
    return jnp.where(is_in_MT.any(0), is_in_MT.argmax(0), -1)

  ids_BT = jax.vmap(document_of)(q_offsets, q_seqlen)
  out = attention(q, k, v, ids_BT, implementation="xla", scale=scale)
  return jnp.where((ids_BT >= 0)[..., None, None], out, 0)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_documents_by_their_places_are_the_same_function(heads, monkeypatch):
  monkeypatch.setattr(kernels, "takes_documents", lambda: True)
  monkeypatch.setattr(cudnn, "dot_product_attention", _by_places)
  monkeypatch.setattr(kernels, "MOST_DOCUMENTS", 5)
  arrays, segments = _inputs(16, *heads, np.float32, V=5)
  counts = [len(set(row)) for row in np.asarray(segments).tolist()]
  assert max(counts) == 5 > min(counts)  # Some places are empty, one row has them all.
  expected = _value_and_grads("xla", arrays, segments, 0.4)
  _value_and_grads.clear_cache()
  found = _value_and_grads("cudnn_packed", arrays, segments, 0.4)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
  # A row with more documents shows it; the others stay.
  monkeypatch.setattr(kernels, "MOST_DOCUMENTS", 4)
  _value_and_grads.clear_cache()
  out, *_ = _value_and_grads("cudnn_packed", arrays, segments, 0.4)
  fits = np.array(counts) <= 4
  assert np.isnan(out).any(axis=(1, 2, 3)).tolist() == (~fits).tolist()
  np.testing.assert_allclose(out[fits], expected[0][fits], rtol=1e-5, atol=2e-6)


def test_keys_of_documents_are_placed_where_they_are(monkeypatch):
  """The rule of JAX from 0.12 on, and the one before; then what is installed."""
  def placed(heads_of):
    def fix(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k):
      starts = kv_offsets[:, :-1]
      strides = (x.shape[2] * x.shape[3] for x in (q, heads_of(q, k)))
      places = (np.append(starts, 4) * stride for stride in strides)
      return q_seqlen, kv_seqlen, *places
    return fix

  for heads_of, expected in ((lambda q, k: k, True), (lambda q, k: q, False)):
    monkeypatch.setattr(cudnn, "_fix_seqlen_offsets", placed(heads_of))
    assert kernels.places_keys.__wrapped__() == expected
  monkeypatch.undo()
  found = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
  assert kernels.places_keys.__wrapped__() == found


def test_places_of_documents_are_refused_where_there_are_none(monkeypatch):
  monkeypatch.setattr(kernels, "takes_documents", lambda: False)
  with pytest.raises(ValueError, match="'cudnn_packed' before Hopper, nor with a JAX"):
    choose_implementation("cudnn_packed", "gpu", jnp.bfloat16, 64, 256)


def test_a_named_implementation_is_kept_and_an_unknown_one_refused():
  arguments = ("cpu", jnp.float32, 64, 256)
  assert choose_implementation("xla", *arguments) == "xla"
  with pytest.raises(ValueError, match=r"trunk\.attention must be one of.*got 'flash'"):
    choose_implementation("flash", *arguments)
