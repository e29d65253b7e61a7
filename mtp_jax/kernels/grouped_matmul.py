"""Products of tokens with the matrices of their chosen experts; none is dropped.

Choices are sorted by expert into rows of one buffer. Every expert's group is padded to
whole blocks of rows, so that a block has one expert: the block-sparse view of
MegaBlocks (Gale et al. 2022, arXiv 2211.15841), in plain JAX. `blocked` loops over
chunks of blocks: it gathers the matrices of a chunk and multiplies the chunk at once.
`ragged` is `jax.lax.ragged_dot` on the same rows, which is a kernel on TPU. On CPU, and
on GPU in many versions, XLA expands `ragged_dot` to one dense product per expert, that
is, num_experts times the work. On TPU XLA expands its derivative by the matrices, so
that this derivative is `blocked` there. `tokamax` is the kernel of this package for
GPUs, forward and backward, on rows without padding.

Legend: N tokens, k choices per token, A = N k choices, E experts, Q rows of the buffer,
G blocks, S rows of a block, C blocks of a chunk, D and F inputs and outputs.
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention import import_tokamax
from mtp_jax.sharding import platform

# Sums over the rows of each expert.
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
# Fewer rows of an expert do not fill a kernel of tokamax.
_LEAST_ROWS = 64


class _Costs(NamedTuple):
  """What `blocked` weighs on a platform.

  rows_per_copy: copying a block's matrix takes as long as multiplying so many rows.
  max_block: most rows of a block.
  max_gathered: entries of the matrices that are gathered at once.
  """

  rows_per_copy: int
  max_block: int
  max_gathered: int


_COSTS = _Costs(24, 256, 2**25)
# A GPU reads, writes and reads 2 bytes of each entry at 4 TB/s, or multiplies by it
# 500 times. A loop over chunks waits for the host, hence all matrices at once.
_COSTS_OF_GPU = _Costs(512, 2048, 2**28)


class Plan(NamedTuple):
  """Static sizes, the same for every load; see `make_plan`.

  block: S. num_blocks: G, enough for any load. chunk: C, which divides `num_blocks`.
  """

  implementation: str
  block: int
  num_blocks: int
  chunk: int


class Rows(NamedTuple):
  """The place of every choice in the buffer; blocks in use come first.

  choice_Q: the choice n * k + j of each row; N * k where the row is empty.
  row_Nk:   the row of each choice; Q where its expert is not among the E.
  expert_G: the expert of each block; E where the block is unused.
  """

  choice_Q: jax.Array
  row_Nk: jax.Array
  expert_G: jax.Array


def choose_implementation(implementation: str, platform: str) -> str:
  """Returns "ragged", "tokamax" or "blocked".

  `auto` is `ragged` on TPU, `tokamax` on GPU where it is installed, else `blocked`.
  """
  if implementation != "auto":
    return implementation
  if platform in ("gpu", "cuda") and importlib.util.find_spec("tokamax"):
    return "tokamax"
  return "ragged" if platform == "tpu" else "blocked"


def make_plan(
  implementation: str,
  num_choices: tuple[int, int],
  num_experts: int,
  num_local: int,
  matrix_size: int,
) -> Plan:
  """Returns the sizes for choices [N, k] among `num_experts`.

  Of these experts `num_local` are on this device. `matrix_size`: entries of one matrix.
  """
  tokens, k = num_choices
  per_expert = tokens * k / num_experts
  if implementation == "tokamax":
    if per_expert >= _LEAST_ROWS:
      return Plan(implementation, 1, tokens * min(k, num_local), 1)
    implementation = "blocked"
  costs = _COSTS_OF_GPU if platform() in ("gpu", "cuda") else _COSTS
  block = block_size(per_expert, costs)
  # A token's choices are distinct: at most min(k, num_local) of them fall on this
  # device, and each local expert wastes less than a block.
  most = tokens * min(k, num_local)
  num_blocks = (most + min(most, num_local) * (block - 1)) // block
  chunk = max(1, min(num_blocks, costs.max_gathered // matrix_size))
  # About num_local / num_experts of the blocks will be in use: chunks of a quarter of
  # those let the loop skip most of the rest.
  if num_local < num_experts:
    chunk = min(chunk, -(-num_blocks * num_local // (4 * num_experts)))
  num_blocks = -(-num_blocks // chunk) * chunk
  return Plan(implementation, block, num_blocks, chunk)


def block_size(per_expert: float, costs: _Costs = _COSTS) -> int:
  """Returns the rows of a block for m choices per expert, a power of two.

  Every expert wastes up to one block, and every block costs a copy of a matrix. With a
  copy worth c rows, (m / S + 1) (c + S) is least at S = sqrt(c m).
  """
  if per_expert <= 1:
    return 1
  best = math.sqrt(costs.rows_per_copy * per_expert)
  return min(costs.max_block, 2 ** round(math.log2(best)))


def sort_by_expert(expert_Nk: jax.Array, num_experts: int, plan: Plan) -> Rows:
  """Returns the rows of the choices that fall on experts 0 to `num_experts` - 1."""
  block, num_rows = plan.block, plan.num_blocks * plan.block
  # Choices of other devices' experts sort behind all local ones.
  is_here_A = ((expert_Nk >= 0) & (expert_Nk < num_experts)).ravel()
  expert_A = jnp.where(is_here_A, expert_Nk.ravel(), num_experts)
  order_A = jnp.argsort(expert_A, stable=True)
  # Padding every group to whole blocks shifts the groups behind it.
  start_E1 = jnp.searchsorted(expert_A[order_A], jnp.arange(num_experts + 1))
  last_block_E = jnp.cumsum(-(-jnp.diff(start_E1) // block))
  shift_E1 = jnp.pad(last_block_E, (1, 0)) * block - start_E1
  choices_A = jnp.arange(expert_A.size)
  place_A = jnp.zeros_like(order_A).at[order_A].set(choices_A, unique_indices=True)
  row_A = jnp.where(is_here_A, place_A + shift_E1[expert_A], num_rows)
  return Rows(
    choice_Q=jnp.full(num_rows, expert_A.size).at[row_A].set(choices_A, mode="drop"),
    row_Nk=row_A.reshape(expert_Nk.shape),
    expert_G=jnp.searchsorted(last_block_E, jnp.arange(plan.num_blocks), side="right"),
  )


def num_computed(rows: Rows) -> jax.Array:
  """Returns the number of choices that have a row, and so are computed."""
  return jnp.sum(rows.choice_Q < rows.row_Nk.size)


@jax.custom_vjp
def to_rows(x_ND: jax.Array, rows: Rows) -> jax.Array:
  """Returns x_QD: the token of each row's choice; empty rows are 0.

  `to_rows` and `from_rows` are each other's derivative. Both gather: plain autodiff
  would turn a gather into a scatter, which adds in sequence.
  """
  token_Q = rows.choice_Q // rows.row_Nk.shape[1]
  return x_ND.at[token_Q].get(mode="fill", fill_value=0)


@jax.custom_vjp
def from_rows(y_QD: jax.Array, rows: Rows) -> jax.Array:
  """Returns y_ND: for each token, the sum of the rows of its choices."""
  y_NkD = y_QD.at[rows.row_Nk].get(mode="fill", fill_value=0)
  wide = jnp.promote_types(y_QD.dtype, jnp.float32)
  return jnp.sum(y_NkD, axis=1, dtype=wide).astype(y_QD.dtype)


to_rows.defvjp(
  lambda x_ND, rows: (to_rows(x_ND, rows), rows),
  lambda rows, d_QD: (from_rows(d_QD, rows), None),
)
from_rows.defvjp(
  lambda y_QD, rows: (from_rows(y_QD, rows), rows),
  lambda rows, d_ND: (to_rows(d_ND, rows), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_QD: jax.Array, w_EDF: jax.Array, expert_G: jax.Array, plan: Plan
) -> jax.Array:
  """Returns out_QF: each row times its block's matrix; unused blocks are arbitrary.

  `x_QD`, `w_EDF` and the result have one dtype; sums are float32 or wider.
  """
  if plan.implementation == "ragged":
    out_QF = jax.lax.ragged_dot(
      x_QD,
      w_EDF,
      _rows_of_experts(expert_G, w_EDF.shape[0], plan),
      preferred_element_type=_wide(x_QD),
    )
    return out_QF.astype(x_QD.dtype)
  if plan.implementation == "tokamax":
    return import_tokamax().ragged_dot(
      x_QD, w_EDF, _rows_of_experts(expert_G, w_EDF.shape[0], plan),
      preferred_element_type=x_QD.dtype,
    )

  def multiply(out_GSF: jax.Array, index_C: jax.Array) -> jax.Array:
    w_CDF = w_EDF.at[expert_G[index_C]].get(mode="clip")
    x_CSD = jax.lax.dynamic_slice_in_dim(x_GSD, index_C[0], plan.chunk)
    product = jnp.einsum(
      "CSD,CDF->CSF", x_CSD, w_CDF, preferred_element_type=_wide(x_QD)
    ).astype(x_QD.dtype)
    if plan.chunk == plan.num_blocks:
      return product
    return jax.lax.dynamic_update_slice_in_dim(out_GSF, product, index_C[0], 0)

  # Unused blocks lie at the end, so the loop over chunks stops early.
  x_GSD = _blocks(x_QD, plan)
  empty_GSF = jnp.zeros((*x_GSD.shape[:2], w_EDF.shape[2]), x_QD.dtype)
  out_GSF = _over_chunks(multiply, empty_GSF, expert_G, w_EDF.shape[0], plan)
  return out_GSF.reshape(x_QD.shape[0], -1)


def _forward(x_QD, w_EDF, expert_G, plan):
  return grouped_matmul(x_QD, w_EDF, expert_G, plan), (x_QD, w_EDF, expert_G)


def _backward(plan, saved, d_out_QF):
  x_QD, w_EDF, expert_G = saved
  d_x_QD = grouped_matmul(d_out_QF, jnp.swapaxes(w_EDF, 1, 2), expert_G, plan)
  if plan.implementation == "tokamax":
    d_w_EDF = import_tokamax().ragged_dot_general(
      x_QD, d_out_QF, _rows_of_experts(expert_G, w_EDF.shape[0], plan), _OVER_ROWS,
      preferred_element_type=w_EDF.dtype,
    )
    return d_x_QD, d_w_EDF, None
  x_GSD, d_out_GSF = _blocks(x_QD, plan), _blocks(d_out_QF, plan)

  def add(d_w_EDF: jax.Array, index_C: jax.Array) -> jax.Array:
    x_CSD, d_out_CSF = (
      jax.lax.dynamic_slice_in_dim(a_GSX, index_C[0], plan.chunk)
      for a_GSX in (x_GSD, d_out_GSF)
    )
    d_w_CDF = jnp.einsum(
      "CSD,CSF->CDF", x_CSD, d_out_CSF, preferred_element_type=_wide(x_QD)
    )
    return d_w_EDF.at[expert_G[index_C]].add(d_w_CDF, mode="drop")

  zeros = jnp.zeros(w_EDF.shape, _wide(x_QD))
  d_w_EDF = _over_chunks(add, zeros, expert_G, w_EDF.shape[0], plan)
  return d_x_QD, d_w_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _rows_of_experts(expert_G: jax.Array, num_experts: int, plan: Plan) -> jax.Array:
  blocks_E = jnp.sum(expert_G[:, None] == jnp.arange(num_experts), axis=0)
  return (blocks_E * plan.block).astype(jnp.int32)


def _over_chunks(step, carry, expert_G, num_experts, plan):
  """Returns `carry` after `step(carry, index_C)` for each chunk with blocks in use."""
  index_C = jnp.arange(plan.chunk)
  if plan.chunk == plan.num_blocks:
    return step(carry, index_C)
  num_used = -(-jnp.sum(expert_G < num_experts) // plan.chunk)
  return jax.lax.fori_loop(
    0, num_used, lambda i, carry: step(carry, i * plan.chunk + index_C), carry
  )


def _blocks(x_QX: jax.Array, plan: Plan) -> jax.Array:
  return x_QX.reshape(plan.num_blocks, plan.block, -1)


def _wide(x: jax.Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)
