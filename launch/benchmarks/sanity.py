"""Compares what an accelerator computes with what XLA and a CPU compute.

  python -m launch.benchmark sanity

Losses and gradients of a small model: on this device and on its CPU, in float32 and in
the compute dtype of each. Attention: every kernel of this device against plain XLA, on
rows of several documents, with its gradients. Products of tokens with the matrices of
their experts: every kernel against plain XLA in float32, with its gradients, with one
expert that no token chose. Rows of two documents against each document in a row of its
own. A pack of trials against each trial alone. A difference is the largest one over the
largest value; a check fails above its bound, and the command ends with exit code 1.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import harness, pages
from launch.tables import markdown
from mtp_jax.batch import Batch
from mtp_jax.config import Config, with_overrides
from mtp_jax.kernels.attention import attention, largest_head, takes_documents
from mtp_jax.kernels.grouped_matmul import (
  from_rows,
  grouped_matmul,
  make_plan,
  sort_by_expert,
  to_rows,
)
from mtp_jax.lm import MtpLm
from mtp_jax.pack_program import Pack
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import loss_and_grads, programs

_SIZES = {"seq_len": 256, "batch_size": 4}
PRESETS = {
  "cpu": {"models": ["1M"], **_SIZES}, "gpu": {"models": ["10M"], **_SIZES},
  "quick": {"models": ["tiny"], "seq_len": 32, "batch_size": 2},
}
harness.define_settings(PRESETS, {"models": harness.MODELS})
# Bounds: float32 sums in another order; bfloat16 has 8 bits of mantissa.
_WIDE, _NARROW = 1e-3, 3e-2


def main() -> int:
  settings = harness.read_settings(PRESETS)
  lines = []
  for model in settings.models:
    config = harness.make_config(
      model, "llama", 264, "sequential", 1, settings.seq_len, settings.batch_size
    )
    for name, check, bound in checks(config):
      try:
        value = check()
        is_right = bool(value <= bound)  # False where it is no number.
        line = {"difference": f"{value:.2e}", "ended": "right" if is_right else "WRONG"}
      except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        line = {"difference": "-", "ended": f"{type(error).__name__}: {text}"}
      lines.append({"model": model, "check": name, "bound": f"{bound:g}"} | line)
      print(lines[-1], flush=True)
  pages.write_page(
    "sanity", settings, lines, __doc__, [markdown(lines)], packages=("jax",),
    device=jax.devices()[0].device_kind,
  )
  return int(any(line["ended"] != "right" for line in lines))


def checks(config: Config) -> Iterator[tuple[str, Callable[[], float], float]]:
  """Yields name, check and bound of every comparison that this device allows."""
  for dtype, bound in (("float32", _WIDE), ("auto", _NARROW)):
    changed = with_overrides(config, {"trunk.compute_dtype": dtype})
    compare = functools.partial(_against_cpu, changed)
    yield f"loss and gradients against the CPU, {dtype}", compare, bound
  is_gpu = jax.devices()[0].platform == "gpu"
  tokamax = ["tokamax"] if importlib.util.find_spec("tokamax") else []
  bound = _NARROW if is_gpu else _WIDE
  # Heads of queries and keys, sizes of keys and values: the last of latent attention.
  shapes = [(8, 8, 64, 64), (8, 2, 64, 64), (4, 4, 128, 128), (4, 4, 96, 64)]
  shapes += [(4, 4, 192, 128)] if largest_head() >= 192 else []
  packed = ["cudnn_packed"] if is_gpu and takes_documents() else []
  for kernel in ["cudnn" if is_gpu else "blocked", *packed, *tokamax]:
    for heads in shapes:
      text = f"attention of {kernel}, heads {heads}"
      yield text, functools.partial(_attention, kernel, config, *heads), bound
  for kernel in ["blocked", *tokamax]:
    yield f"products of experts, {kernel}", functools.partial(_experts, kernel), bound
  yield "documents in one row against rows of their own", functools.partial(
    _packed_rows, config
  ), bound
  yield "a pack of two trials against each alone", functools.partial(
    _packed_trials, config
  ), bound


def _difference(found: Any, expected: Any) -> float:
  """Returns the largest difference over the largest value, of the worst leaf."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(float(np.max(np.abs(b), initial=0.0)), 1e-30)
    # `max` would drop what is no number.
    worst = float(np.maximum(worst, np.max(np.abs(a - b), initial=0.0) / scale))
  return worst


def _rows(config: Config) -> Batch:
  """Returns random rows of two documents each."""
  batch = harness.one_document_batch(config)
  half = config.data.seq_len // 2
  segments, positions = batch.segment_ids.copy(), batch.positions.copy()
  segments[:, half:] = 2
  positions[:, half:] -= half
  return batch._replace(
    segment_ids=segments, positions=positions,
    next_segment_ids=np.full_like(batch.next_segment_ids, 2),
  )


def _against_cpu(config: Config) -> float:
  def on(device: jax.Device) -> Any:
    mesh, program = make_mesh(config.mesh, [device]), program_config(config)
    rows = jax.tree.map(lambda x: x[None], _rows(config))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
      sums, _, grads = jax.jit(functools.partial(loss_and_grads, program))(
        jax.device_put(params, device), put_batch(mesh, rows, ("microbatch",)),
        jnp.ones(1 + config.mtp.depth),
      )
    return jax.device_get((sums.total, grads))

  cpu = jax.devices("cpu")[0]
  mesh = make_mesh(config.mesh, [cpu])
  with jax.set_mesh(mesh):
    params = jax.device_get(programs(program_config(config), mesh).init(np.int32(0)))
  params = params.params
  return _difference(on(jax.devices()[0]), on(cpu))


def _attention(kernel: str, config: Config, N: int, G: int, H: int, V: int) -> float:
  keys = jax.random.split(jax.random.key(0), 4)
  rows, length = config.data.batch_size, config.data.seq_len
  is_gpu = jax.devices()[0].platform == "gpu"
  dtype = jnp.bfloat16 if is_gpu else jnp.float32
  q, k, v, d_out = (
    jax.random.normal(key, (rows, length, *shape), dtype)
    for key, shape in zip(keys, ((N, H), (G, H), (G, V), (N, V)), strict=True)
  )
  segments = jnp.asarray(_rows(config).segment_ids)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_grads(implementation: str) -> Any:
    out, pullback = jax.vjp(
      lambda *x: attention(*x, segments, implementation=implementation), q, k, v
    )
    return out, pullback(d_out)

  return _difference(value_and_grads(kernel), value_and_grads("xla"))


def _experts(kernel: str) -> float:
  N, E, D, F = 512, 4, 256, 192  # Rows enough for the kernel of tokamax.
  keys = jax.random.split(jax.random.key(0), 4)
  # Two experts of each token: many choose the first, none the last.
  scores_NE = jax.random.normal(keys[0], (N, E)) + jnp.array([2.0, 1, 0, -jnp.inf])
  expert_Nk = jax.lax.top_k(scores_NE, 2)[1]
  plan = make_plan(kernel, expert_Nk.shape, E, E, D * F)
  is_gpu = jax.devices()[0].platform == "gpu"
  x, w, d_out = (
    jax.random.normal(key, shape, jnp.bfloat16 if is_gpu else jnp.float32)
    for key, shape in zip(keys[1:], ((N, D), (E, D, F), (N, F)), strict=True)
  )

  def of_kernel(x_ND: jax.Array, w_EDF: jax.Array) -> jax.Array:
    rows = sort_by_expert(expert_Nk, E, plan)
    return from_rows(
      grouped_matmul(to_rows(x_ND, rows), w_EDF, rows.expert_G, plan), rows
    )

  def plain(x_ND: jax.Array, w_EDF: jax.Array) -> jax.Array:
    is_chosen_NE = jnp.sum(jax.nn.one_hot(expert_Nk, E), axis=1)
    return jnp.einsum("NE,ND,EDF->NF", is_chosen_NE, x_ND, w_EDF)

  def value_and_grads(product: Callable[..., jax.Array], *arrays: jax.Array) -> Any:
    *inputs, d_out_NF = arrays
    out_NF, pullback = jax.vjp(product, *inputs)
    return out_NF, pullback(d_out_NF)

  found = jax.jit(functools.partial(value_and_grads, of_kernel))(x, w, d_out)
  with jax.default_matmul_precision("highest"):
    expected = jax.jit(functools.partial(value_and_grads, plain))(
      *(a.astype(jnp.float32) for a in (x, w, d_out))
    )
  return _difference(found, expected)


def _packed_rows(config: Config) -> float:
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  half = config.data.seq_len // 2
  both = _rows(config)
  # The second document at the start of a row, and padding behind it.
  ids = np.roll(both.segment_ids, -half, axis=1) // 2
  alone = both._replace(
    tokens=np.roll(both.tokens, -half, axis=1), segment_ids=ids,
    positions=np.where(ids > 0, np.arange(ids.shape[1]), 0).astype(np.int32),
  )
  with jax.set_mesh(mesh):
    params = programs(program_config(config), mesh).init(np.int32(0)).params
    hidden = jax.jit(lambda batch: MtpLm(config).apply({"params": params}, batch))
    packed_MBTD, own_MBTD = hidden(both), hidden(alone)
  # The last positions of extra depths see tokens after the row, which differ.
  seen = half - config.mtp.depth
  return _difference(
    own_MBTD[:, :, :seen].astype(jnp.float32),
    packed_MBTD[:, :, half : half + seen].astype(jnp.float32),
  )


def _packed_trials(config: Config) -> float:
  mesh, program = make_mesh(config.mesh, jax.devices()[:1]), program_config(config)
  rows, hyper = jax.tree.map(lambda x: x[None], _rows(config)), hyperparameters(config)
  with jax.set_mesh(mesh):
    made = programs(program, mesh)
    states = [jax.device_get(made.init(np.int32(seed))) for seed in (0, 1)]
    batch = put_batch(mesh, rows, ("microbatch",))
    alone = [
      float(made.step(jax.device_put(x), batch, hyper, np.bool_(True))[1]["loss_total"])
      for x in states
    ]
  pack = Pack(program, states, [hyper] * 2, 2, jax.devices()[:1])
  shared = pack.put([rows])
  pack.compile(shared)
  pack.step(shared, {0: True, 1: True})
  together = [float(pack.report(i)["loss_total"]) for i in (0, 1)]
  return _difference(together, alone)
