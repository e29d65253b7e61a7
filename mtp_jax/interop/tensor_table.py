"""The table of tensors: which tensor of a layout holds which of our parameters.

A line of the table has a tensor's name, its parameters and their form in the file.
Import and export use the same table; forms are invertible, so that reading an exported
file returns the same bits.

Legend: L layers, E experts, D embed, N heads, H head dim.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mtp_jax.config import Config, TrunkConfig
from mtp_jax.interop.layouts import NUMBERED
from mtp_jax.predictors import num_trunk_layers

Shapes = dict[str, tuple[int, ...]]  # By path of a parameter: "embed/embedding".


class Form(NamedTuple):
  """The form of one parameter in a file: flat, or a matrix.

  inputs:      number of leading axes that are inputs of a matrix product; 0: a vector.
  transposed:  the matrix in the file is [outputs, inputs].
  axis, order: entry i of our parameter along `axis` is entry order[i] in the file.
  """

  dtype = None  # As in the file.
  inputs: int
  transposed: bool = False
  axis: int = 0
  order: np.ndarray | None = None

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in the file, given our shape."""
    if self.inputs == 0:
      return (int(np.prod(shape)),)
    split = shape[: self.inputs], shape[self.inputs :]
    rows, columns = (int(np.prod(part)) for part in split)
    return (columns, rows) if self.transposed else (rows, columns)

  def to_ours(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns our parameter: a view, unless its entries are reordered."""
    ours = (stored.T if self.transposed else stored).reshape(shape)
    return ours if self.order is None else ours.take(self.order, self.axis)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    """Returns the inverse of `to_ours`."""
    stored_shape = self.stored_shape(ours.shape)
    if self.order is not None:
      ours = ours.take(np.argsort(self.order), self.axis)
    return ours.reshape(stored_shape[::-1]).T if self.transposed else (
      ours.reshape(stored_shape)
    )


class TokenOffsets(NamedTuple):
  """The form of the ids of a reduced vocabulary: number i has the id i + offset[i]."""

  dtype = np.dtype(np.int64)

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape

  def to_ours(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (stored + np.arange(*shape)).astype(np.float32)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    return ours.astype(np.int64) - np.arange(len(ours))


class TokenMask(NamedTuple):
  """The form of the same ids as a mask of the whole vocabulary; it is never read."""

  vocab_size: int
  dtype = np.dtype(np.bool_)

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (self.vocab_size,)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    return np.isin(np.arange(self.vocab_size), ours)


class OneRow(NamedTuple):
  """The form of a vector that the file has with two axes of one entry before it."""

  dtype = None

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, 1, *shape)

  def to_ours(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return stored.reshape(shape)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    return ours[None, None]


AnyForm = Form | TokenOffsets | TokenMask | OneRow


class Piece(NamedTuple):
  """One parameter, or one entry of a stack; `shape` is without the stack's axes."""

  path: str
  index: tuple[int, ...]
  shape: tuple[int, ...]
  form: AnyForm


class Entry(NamedTuple):
  """One tensor of a file.

  pieces:  our parameters, joined along the last axis; none: the tensor is zeros.
  copy_of: name of the tensor that this one repeats. A folder may lack the copy; if it
           has the copy, the values must be equal.
  written: whether export writes the tensor.
  row:     a row of the tensor, and the parameter that the row holds in place of its
           entry of `pieces`.
  """

  name: str
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...] = ()
  copy_of: str = ""
  written: bool = True
  row: tuple[int, Piece] | None = None


class Line(NamedTuple):
  """A tensor of a block; with `{expert}` in its name, one tensor per expert.

  `zeros`: shape of the tensor if our block has no such parameter.
  """

  name: str
  paths: tuple[str, ...]
  form: AnyForm
  zeros: tuple[int, ...] = ()


VECTOR, MATRIX = Form(0), Form(1)
LINEAR, LINEAR_2 = Form(1, transposed=True), Form(2, transposed=True)

_GPT2_BLOCK = (
  Line("ln_1.weight", ("attention_norm/scale",), VECTOR),
  Line("ln_1.bias", ("attention_norm/bias",), VECTOR),
  Line(
    "attn.c_attn.weight",
    ("attention/query", "attention/key", "attention/value"),
    MATRIX,
  ),
  Line(
    "attn.c_attn.bias",
    ("attention/query_bias", "attention/key_bias", "attention/value_bias"),
    VECTOR,
  ),
  Line("attn.c_proj.weight", ("attention/out",), Form(2)),
  Line("attn.c_proj.bias", ("attention/out_bias",), VECTOR),
  Line("ln_2.weight", ("mlp_norm/scale",), VECTOR),
  Line("ln_2.bias", ("mlp_norm/bias",), VECTOR),
  Line("mlp.c_fc.weight", ("mlp/up",), MATRIX),
  Line("mlp.c_fc.bias", ("mlp/up_bias",), VECTOR),
  Line("mlp.c_proj.weight", ("mlp/down",), MATRIX),
  Line("mlp.c_proj.bias", ("mlp/down_bias",), VECTOR),
)

NORMS = (
  Line("input_layernorm.weight", ("attention_norm/scale",), VECTOR),
  Line("post_attention_layernorm.weight", ("mlp_norm/scale",), VECTOR),
)

GROUPED_ATTENTION = (
  Line("self_attn.q_proj.weight", ("attention/query",), LINEAR),
  Line("self_attn.k_proj.weight", ("attention/key",), LINEAR),
  Line("self_attn.v_proj.weight", ("attention/value",), LINEAR),
  Line("self_attn.o_proj.weight", ("attention/out",), LINEAR_2),
)

QK_NORMS = (
  Line("self_attn.q_norm.weight", ("attention/query_head_norm/scale",), VECTOR),
  Line("self_attn.k_norm.weight", ("attention/key_head_norm/scale",), VECTOR),
)


def _swiglu(theirs: str, ours: str) -> tuple[Line, ...]:
  return (
    Line(f"{theirs}.gate_proj.weight", (f"{ours}/gate",), LINEAR),
    Line(f"{theirs}.up_proj.weight", (f"{ours}/up",), LINEAR),
    Line(f"{theirs}.down_proj.weight", (f"{ours}/down",), LINEAR),
  )


DENSE = _swiglu("mlp", "mlp")

_EXPERTS = (
  Line("mlp.gate.weight", ("moe/router",), LINEAR),
  Line("mlp.gate.e_score_correction_bias", ("moe/bias",), VECTOR),
  *_swiglu("mlp.shared_experts", "moe/shared"),
  *_swiglu("mlp.experts.{expert}", "moe/experts"),
)

_DEEPSEEK_MODULE = (
  Line("enorm.weight", ("embed_norm/scale",), VECTOR),
  Line("hnorm.weight", ("hidden_norm/scale",), VECTOR),
  Line("shared_head.norm.weight", ("out_norm/scale",), VECTOR),
)

_MIMO_MODULE = (
  Line("token_layernorm.weight", ("embed_norm/scale",), VECTOR),
  Line("hidden_layernorm.weight", ("hidden_norm/scale",), VECTOR),
  Line("input_proj.weight", ("projection",), LINEAR),
  Line("final_layernorm.weight", ("out_norm/scale",), VECTOR),
)

# How many routed experts, all zeros, stand beside a dense MLP in the layout glm4_moe:
# a router's group has at least two.
ZERO_EXPERTS = 2

# The order of the two inputs of a module's projection in the file.
CONCAT_ORDER = {
  **dict.fromkeys(NUMBERED, ("embedding", "hidden")),
  "mimo": ("hidden", "embedding"),
}


def tensor_table(config: Config, layout: str, shapes: Shapes) -> tuple[Entry, ...]:
  """Returns the tensors of `layout` that hold the parameters of `config`.

  `shapes` has every parameter of the config. Predictors beyond the next token are
  included where the layout has a place for them.
  """
  entries = tuple(_entries(config, layout, shapes))
  names = [entry.name for entry in entries]
  assert len(names) == len(set(names)), "a name is in the table twice"
  return entries


def _entries(config: Config, layout: str, shapes: Shapes) -> Iterator[Entry]:
  trunk, depth = config.trunk, config.mtp.depth
  layers, num_dense = num_trunk_layers(config), trunk.dense_prefix
  if layout == "gpt2":
    embed, norm, layer = "transformer.wte", "transformer.ln_f", "transformer.h"
  else:
    embed, norm, layer = "model.embed_tokens", "model.norm", "model.layers"

  def stacked(lines: tuple[Line, ...], prefix: str, path: str, index: tuple):
    return expand(lines, prefix, path, index, trunk.moe.num_experts, shapes)

  top = [Line(f"{embed}.weight", ("embed/embedding",), MATRIX)]
  if layout == "gpt2":
    position = "transformer.wpe.weight"
    top.append(Line(position, ("position_embed/embedding",), MATRIX))
    top.append(Line(f"{norm}.bias", ("final_norm/bias",), VECTOR))
  top.append(Line(f"{norm}.weight", ("final_norm/scale",), VECTOR))
  if not trunk.tie_embeddings:
    top.append(Line("lm_head.weight", ("unembed/kernel",), LINEAR))
  yield from stacked(tuple(top), "", "", ())
  table = shapes["embed/embedding"]
  if trunk.tie_embeddings:
    yield Entry("lm_head.weight", table, copy_of=f"{embed}.weight", written=False)

  # Our blocks are stacked, dense ones apart; theirs are numbered through.
  dense = _block(trunk.dense(), layout)
  for i in range(num_dense):
    yield from stacked(dense, f"{layer}.{i}.", "trunk/dense_blocks/", (i,))
  block = _block(trunk, layout)
  if layout == "glm4_moe" and not trunk.moe.num_experts:
    block = _block_without_dense_form(trunk)
  for i in range(num_dense, layers):
    yield from stacked(block, f"{layer}.{i}.", "trunk/blocks/", (i - num_dense,))

  # A shared module is written once per depth, because readers expect a layer for each.
  for k in range(depth if layout in CONCAT_ORDER else 0):
    index = () if config.mtp.share_modules else (k,)
    if layout == "mimo":
      module, prefix = _MIMO_MODULE, f"model.mtp_layers.{k}."
    else:
      swapped = LINEAR._replace(order=halves_swapped(trunk.embed_dim))
      join = Line("eh_proj.weight", ("projection",), swapped)
      module, prefix = (*_DEEPSEEK_MODULE, join), f"model.layers.{layers + k}."
      # Some engines read these copies, others the trunk's tensors: write both.
      head = embed if trunk.tie_embeddings else "lm_head"
      for copy, of in (("embed_tokens", embed), ("shared_head.head", head)):
        yield Entry(f"{prefix}{copy}.weight", table, copy_of=f"{of}.weight")
    yield from stacked(module, prefix, "mtp/modules/", index)
    yield from stacked(block, prefix, "mtp/modules/block/", index)


def halves_swapped(dim: int) -> np.ndarray:
  """Returns the order that puts the embedding before the hidden state."""
  return np.roll(np.arange(2 * dim), dim)


def _block(trunk: TrunkConfig, layout: str) -> tuple[Line, ...]:
  if layout == "gpt2":
    return _GPT2_BLOCK
  feed_forward = _EXPERTS if trunk.moe.num_experts else DENSE
  if layout == "deepseek_v3":
    return (*NORMS, *_latent_attention(trunk), *feed_forward)
  biases = qkv_biases(trunk) if trunk.qkv_bias or layout == "mimo" else ()
  norms = QK_NORMS if trunk.qk_norm else ()
  return (*NORMS, *GROUPED_ATTENTION, *biases, *norms, *feed_forward)


def _block_without_dense_form(trunk: TrunkConfig) -> tuple[Line, ...]:
  """Returns a dense block as a layer with experts: engines have no other for it.

  The MLP is the shared expert; the routed experts, of which nothing remains, are zeros.
  """
  dim, width = trunk.embed_dim, zero_expert_dim(trunk)
  number = ZERO_EXPERTS
  zeros = [("mlp.gate.weight", (number, dim))]
  zeros.append(("mlp.gate.e_score_correction_bias", (number,)))
  for e in range(number):
    for name in ("gate_proj", "up_proj", "down_proj"):
      shape = (dim, width) if name == "down_proj" else (width, dim)
      zeros.append((f"mlp.experts.{e}.{name}.weight", shape))
  without = _block(trunk, "glm4_moe")[: -len(DENSE)]
  return (
    *without,
    *_swiglu("mlp.shared_experts", "mlp"),
    *(Line(name, (), MATRIX, shape) for name, shape in zeros),
  )


def zero_expert_dim(trunk: TrunkConfig) -> int:
  """Returns the width of experts that are zeros: small, and a divisor of the MLP's."""
  return math.gcd(trunk.mlp_dim, 128)


def qkv_biases(trunk: TrunkConfig) -> tuple[Line, ...]:
  heads = (trunk.num_heads, trunk.num_kv_heads, trunk.num_kv_heads)
  return tuple(
    Line(f"self_attn.{name[0]}_proj.bias", (f"attention/{name}_bias",), VECTOR)
    if trunk.qkv_bias
    else Line(f"self_attn.{name[0]}_proj.bias", (), VECTOR, (num * trunk.head_dim,))
    for name, num in zip(("query", "key", "value"), heads, strict=True)
  )


def _latent_attention(trunk: TrunkConfig) -> tuple[Line, ...]:
  """Returns the lines of multi-head latent attention.

  In the file, rotated dimensions come in pairs: pair j is (2j, 2j + 1). In our
  parameters they come in halves: pair j is (j, rope_dim / 2 + j).
  """
  sizes = trunk.latent
  pairs = np.arange(sizes.rope_dim).reshape(-1, 2).T.reshape(-1)

  def after(n: int) -> np.ndarray:
    return np.concatenate([np.arange(n), n + pairs])

  query = LINEAR._replace(axis=2, order=after(sizes.nope_dim))
  if sizes.query_rank:
    queries = (
      Line("self_attn.q_a_proj.weight", ("attention/query_down",), LINEAR),
      Line("self_attn.q_a_layernorm.weight", ("attention/query_norm/scale",), VECTOR),
      Line("self_attn.q_b_proj.weight", ("attention/query",), query),
    )
  else:
    queries = (Line("self_attn.q_proj.weight", ("attention/query",), query),)
  down = LINEAR._replace(axis=1, order=after(sizes.kv_rank))
  return (
    *queries,
    Line("self_attn.kv_a_proj_with_mqa.weight", ("attention/kv_down",), down),
    Line("self_attn.kv_a_layernorm.weight", ("attention/kv_norm/scale",), VECTOR),
    Line("self_attn.kv_b_proj.weight", ("attention/kv_up",), LINEAR),
    Line("self_attn.o_proj.weight", ("attention/out",), LINEAR_2),
  )


def expand(
  lines: tuple[Line, ...],
  prefix: str,
  path: str,
  index: tuple[int, ...],
  num_experts: int,
  shapes: Shapes,
) -> Iterator[Entry]:
  """Yields the tensors of one block, entry `index` of its stack, with all experts."""
  for line in lines:
    if not line.paths:
      yield Entry(prefix + line.name, line.zeros)
      continue
    is_expert = "{expert}" in line.name
    for e in range(num_experts if is_expert else 1):
      at = (*index, e) if is_expert else index
      pieces = tuple(
        Piece(path + leaf, at, shapes[path + leaf][len(at) :], line.form)
        for leaf in line.paths
      )
      stored = [line.form.stored_shape(piece.shape) for piece in pieces]
      shape = (*stored[0][:-1], sum(s[-1] for s in stored))
      yield Entry(prefix + line.name.format(expert=e), shape, pieces)
