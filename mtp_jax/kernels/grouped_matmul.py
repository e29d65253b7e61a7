"""Products of tokens with the matrices of the experts they chose, none left out.

Choices are sorted by expert into rows of one buffer. Every expert's group is padded to
whole blocks of rows, so that a block has one expert: the block-sparse view of
MegaBlocks (Gale et al. 2022, arXiv 2211.15841), in plain JAX. `blocked` gathers the
matrices of some blocks and multiplies these at once, until no block is left. `ragged`
is `jax.lax.ragged_dot` on the same rows: a kernel on TPU. On CPU, and on GPU in many
versions, XLA expands it to one dense product per expert, that is, num_experts times the
work; so it does on TPU with the derivative by the matrices, which here is `blocked`
everywhere.

Legend: N tokens, k choices per token, E experts, R rows, G blocks, S rows of a block, C
blocks multiplied at once, D and F inputs and outputs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Copying a block's matrix takes about as long as multiplying so many rows by it.
_ROWS_PER_COPY = 24
_MAX_BLOCK = 256
# Entries of the matrices that are gathered at once.
_MAX_GATHERED = 2**25


class Plan(NamedTuple):
  """What is fixed before any choice is known; see `make_plan`.

  block: rows of a block, S. num_blocks: enough for any load. chunk: C, a divisor of it.
  """

  implementation: str
  block: int
  num_blocks: int
  chunk: int


class Rows(NamedTuple):
  """Where the choices lie in the buffer; rows in use come first.

  choice_R: the choice n * k + j that a row holds; N * k where it holds none.
  row_Nk:   the row of a choice; R where its expert is not among the E.
  expert_G: whose rows a block holds; E where it is not used.
  """

  choice_R: jax.Array
  row_Nk: jax.Array
  expert_G: jax.Array


def choose_implementation(implementation: str, platform: str) -> str:
  """Returns "ragged" or "blocked"; `auto` is `ragged` on TPU alone."""
  if implementation != "auto":
    return implementation
  return "ragged" if platform == "tpu" else "blocked"


def make_plan(
  implementation: str,
  num_choices: tuple[int, int],
  num_experts: int,
  num_local: int,
  matrix_size: int,
) -> Plan:
  """Returns the plan for choices [N, k] of which those of `num_local` experts are here.

  A token's choices are distinct, hence the number of blocks that serves any load. Where
  not all experts are here, about that fraction of the blocks will be in use; the rest
  is skipped by chunks of a quarter of it. `matrix_size`: entries of one matrix.
  """
  tokens, k = num_choices
  block = block_size(tokens * k / num_experts)
  most = tokens * min(k, num_local)
  num_blocks = (most + min(most, num_local) * (block - 1)) // block
  chunk = max(1, min(num_blocks, _MAX_GATHERED // matrix_size))
  if num_local < num_experts:
    chunk = min(chunk, -(-num_blocks * num_local // (4 * num_experts)))
  num_blocks = -(-num_blocks // chunk) * chunk
  return Plan(implementation, block, num_blocks, chunk)


def block_size(per_expert: float) -> int:
  """Returns the rows of a block for m choices per expert, a power of two.

  Every expert wastes up to one block, and every block costs a copy of a matrix. With a
  copy worth c rows, (m / S + 1) (c + S) is least at S = sqrt(c m).
  """
  if per_expert <= 1:
    return 1
  best = math.sqrt(_ROWS_PER_COPY * per_expert)
  return min(_MAX_BLOCK, 2 ** round(math.log2(best)))


def sort_by_expert(expert_Nk: jax.Array, num_experts: int, plan: Plan) -> Rows:
  """Returns the rows of the choices that fall on experts 0 to `num_experts` - 1."""
  block, num_rows = plan.block, plan.num_blocks * plan.block
  is_here_C = ((expert_Nk >= 0) & (expert_Nk < num_experts)).ravel()
  expert_C = jnp.where(is_here_C, expert_Nk.ravel(), num_experts)
  order_C = jnp.argsort(expert_C, stable=True)
  start_E1 = jnp.searchsorted(expert_C[order_C], jnp.arange(num_experts + 1))
  last_block_E = jnp.cumsum(-(-jnp.diff(start_E1) // block))
  shift_E1 = jnp.pad(last_block_E, (1, 0)) * block - start_E1
  choices_C = jnp.arange(expert_C.size)
  place_C = jnp.zeros_like(order_C).at[order_C].set(choices_C, unique_indices=True)
  row_C = jnp.where(is_here_C, place_C + shift_E1[expert_C], num_rows)
  return Rows(
    choice_R=jnp.full(num_rows, expert_C.size).at[row_C].set(choices_C, mode="drop"),
    row_Nk=row_C.reshape(expert_Nk.shape),
    expert_G=jnp.searchsorted(last_block_E, jnp.arange(plan.num_blocks), side="right"),
  )


def num_computed(rows: Rows) -> jax.Array:
  """Returns how many choices have a row, hence a product."""
  return jnp.sum(rows.choice_R < rows.row_Nk.size)


@jax.custom_vjp
def to_rows(x_ND: jax.Array, rows: Rows) -> jax.Array:
  """Returns x_RD: each choice's token; rows without one are 0.

  This and `from_rows` are each other's derivative, written so that both directions
  read: plain autodiff would turn a gather into a scatter, which adds in sequence.
  """
  token_R = rows.choice_R // rows.row_Nk.shape[1]
  return x_ND.at[token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, rows: Rows) -> jax.Array:
  """Returns y_ND, each token's sum over its choices that have a row."""
  y_NkD = y_RD.at[rows.row_Nk].get(mode="fill", fill_value=0)
  wide = jnp.promote_types(y_RD.dtype, jnp.float32)
  return jnp.sum(y_NkD, axis=1, dtype=wide).astype(y_RD.dtype)


to_rows.defvjp(
  lambda x_ND, rows: (to_rows(x_ND, rows), rows),
  lambda rows, d_RD: (from_rows(d_RD, rows), None),
)
from_rows.defvjp(
  lambda y_RD, rows: (from_rows(y_RD, rows), rows),
  lambda rows, d_ND: (to_rows(d_ND, rows), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_RD: jax.Array, w_EDF: jax.Array, expert_G: jax.Array, plan: Plan
) -> jax.Array:
  """Returns out_RF, each row times its block's matrix; unused blocks hold anything.

  `x_RD` and `w_EDF` are of one dtype, which the result has too; sums are float32 or
  wider.
  """
  if plan.implementation == "ragged":
    blocks_E = jnp.sum(expert_G[:, None] == jnp.arange(w_EDF.shape[0]), axis=0)
    out_RF = jax.lax.ragged_dot(
      x_RD,
      w_EDF,
      (blocks_E * plan.block).astype(jnp.int32),
      preferred_element_type=_wide(x_RD),
    )
    return out_RF.astype(x_RD.dtype)

  def multiply(out_GSF: jax.Array, index_C: jax.Array) -> jax.Array:
    w_CDF = w_EDF.at[expert_G[index_C]].get(mode="clip")
    x_CSD = jax.lax.dynamic_slice_in_dim(x_GSD, index_C[0], plan.chunk)
    product = jnp.einsum(
      "CSD,CDF->CSF", x_CSD, w_CDF, preferred_element_type=_wide(x_RD)
    ).astype(x_RD.dtype)
    if plan.chunk == plan.num_blocks:
      return product
    return jax.lax.dynamic_update_slice_in_dim(out_GSF, product, index_C[0], 0)

  x_GSD = _blocks(x_RD, plan)
  empty_GSF = jnp.zeros((*x_GSD.shape[:2], w_EDF.shape[2]), x_RD.dtype)
  out_GSF = _over_chunks(multiply, empty_GSF, expert_G, w_EDF.shape[0], plan)
  return out_GSF.reshape(x_RD.shape[0], -1)


def _forward(x_RD, w_EDF, expert_G, plan):
  return grouped_matmul(x_RD, w_EDF, expert_G, plan), (x_RD, w_EDF, expert_G)


def _backward(plan, saved, d_out_RF):
  x_RD, w_EDF, expert_G = saved
  d_x_RD = grouped_matmul(d_out_RF, jnp.swapaxes(w_EDF, 1, 2), expert_G, plan)
  x_GSD, d_out_GSF = _blocks(x_RD, plan), _blocks(d_out_RF, plan)

  def add(d_w_EDF: jax.Array, index_C: jax.Array) -> jax.Array:
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, index_C[0], plan.chunk)  # noqa: E731
    d_w_CDF = jnp.einsum(
      "CSD,CSF->CDF", cut(x_GSD), cut(d_out_GSF), preferred_element_type=_wide(x_RD)
    )
    return d_w_EDF.at[expert_G[index_C]].add(d_w_CDF, mode="drop")

  zeros = jnp.zeros(w_EDF.shape, _wide(x_RD))
  d_w_EDF = _over_chunks(add, zeros, expert_G, w_EDF.shape[0], plan)
  return d_x_RD, d_w_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _over_chunks(step, carry, expert_G, num_experts, plan):
  """Runs `step(carry, blocks of the chunk)` over the chunks with blocks in use."""
  index_C = jnp.arange(plan.chunk)
  if plan.chunk == plan.num_blocks:
    return step(carry, index_C)
  num_used = -(-jnp.sum(expert_G < num_experts) // plan.chunk)
  body = lambda i, carry: step(carry, i * plan.chunk + index_C)  # noqa: E731
  return jax.lax.fori_loop(0, num_used, body, carry)


def _blocks(x_RX: jax.Array, plan: Plan) -> jax.Array:
  return x_RX.reshape(plan.num_blocks, plan.block, -1)


def _wide(x: jax.Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)
