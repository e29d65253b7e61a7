"""The table of tensors of folders with drafters alone, see `drafter_config`.

Legend: C draft vocabulary, V vocab, D embed.
"""

from collections.abc import Iterator

from mtp_jax.config import Config
from mtp_jax.interop.layouts import MASKS
from mtp_jax.interop.tensor_table import (
  DENSE,
  GROUPED_ATTENTION,
  LINEAR,
  MATRIX,
  NORMS,
  QK_NORMS,
  VECTOR,
  Entry,
  Line,
  OneRow,
  Piece,
  Shapes,
  TokenMask,
  TokenOffsets,
  expand,
  halves_swapped,
  qkv_biases,
)

_MLP_NORM = Line("post_attention_layernorm.weight", ("mlp_norm/scale",), VECTOR)
# What EAGLE-3 and the kinds made from it have around their layers.
_AROUND = (
  Line("fc.weight", ("fusion/kernel",), LINEAR),
  Line("norm.weight", ("out_norm/scale",), VECTOR),
)


def drafter_table(
  config: Config, shapes: Shapes, mask_token: int = 0
) -> tuple[Entry, ...]:
  """Returns the tensors that hold the extra predictors, and copies of trunk tensors.

  `shapes` has every parameter of the config. `mask_token`: the token whose embedding
  is the mask in the files of P-EAGLE and DFlash.
  """
  kind = config.mtp.kind
  if kind == "medusa":
    return tuple(_medusa_heads(config, shapes))
  if kind == "eagle":
    return tuple(_eagle(config, shapes))
  layers = _block_layers if kind == "dflash" else _fused_layer
  return (
    *_output_matrix(config, shapes),
    _embedding(config, shapes, mask_token),
    *layers(config, shapes),
  )


def _medusa_heads(config: Config, shapes: Shapes) -> Iterator[Entry]:
  """Yields Medusa's tensors; every head has an output matrix, own or the trunk's."""
  head = (
    Line("0.linear.weight", ("kernels",), LINEAR),
    Line("0.linear.bias", ("biases",), VECTOR),
  )
  matrix = Line("1.weight", ("unembed",), LINEAR)
  for k in range(config.mtp.depth):
    yield from expand(head, f"{k}.", "mtp/", (k,), 0, shapes)
    if config.mtp.unembed == "own":
      yield from expand((matrix,), f"{k}.", "mtp/", (k,), 0, shapes)
    else:
      yield from expand((_unembed(config, "1"),), f"{k}.", "", (), 0, shapes)


def _eagle(config: Config, shapes: Shapes) -> Iterator[Entry]:
  """Yields EAGLE-1's tensors: the embedding, a map and one decoder layer."""
  trunk = config.trunk
  yield _embedding(config, shapes)
  # The files have the embedding first in every concatenation, ours the hidden state.
  swapped = LINEAR._replace(order=halves_swapped(trunk.embed_dim))
  around = (Line("fc.weight", ("layer/projection",), swapped),)
  if config.mtp.fc_bias:
    around += (Line("fc.bias", ("layer/projection_bias",), VECTOR),)
  yield from expand(around, "", "mtp/", (), 0, shapes)
  *inputs, out = GROUPED_ATTENTION
  biases = qkv_biases(trunk) if trunk.qkv_bias else ()
  layer = (*inputs, *biases, out, _MLP_NORM, *DENSE)
  yield from expand(layer, "layers.0.", "mtp/layer/", (), 0, shapes)


def _fused_layer(config: Config, shapes: Shapes) -> Iterator[Entry]:
  """Yields the decoder layer of EAGLE-3 or P-EAGLE, and what is around it."""
  around, prefix = _AROUND, "midlayer."
  if config.mtp.kind == "peagle":  # Speculators' names; EAGLE-3 has SafeAILab's.
    around, prefix = (
      (*_AROUND, Line("mask_hidden", ("mask_streams",), OneRow())), "layers.0."
    )
  yield from expand(around, "", "mtp/", (), 0, shapes)
  swapped = LINEAR._replace(order=halves_swapped(config.trunk.embed_dim))
  *inputs, out = GROUPED_ATTENTION
  inputs = [line._replace(form=swapped) for line in inputs]
  norms = (
    Line("hidden_norm.weight", ("hidden_norm/scale",), VECTOR),
    Line("input_layernorm.weight", ("embed_norm/scale",), VECTOR),
  )
  layer = (*norms, *inputs, out, _MLP_NORM, *DENSE)
  yield from expand(layer, prefix, "mtp/layer/", (), 0, shapes)


def _block_layers(config: Config, shapes: Shapes) -> Iterator[Entry]:
  """Yields DFlash's layers, which are Qwen3's, and what is around them."""
  around = (*_AROUND, Line("hidden_norm.weight", ("context_norm/scale",), VECTOR))
  yield from expand(around, "", "mtp/", (), 0, shapes)
  layer = (*NORMS, *GROUPED_ATTENTION, *QK_NORMS, *DENSE)
  for i in range(config.mtp.draft_layers):
    yield from expand(layer, f"layers.{i}.", f"mtp/layer_{i}/", (), 0, shapes)


def _output_matrix(config: Config, shapes: Shapes) -> Iterator[Entry]:
  """Yields the output matrix, own or the trunk's, and the ids of a reduced vocabulary.
  """
  if config.mtp.unembed != "own":
    yield from expand((_unembed(config, "lm_head"),), "", "", (), 0, shapes)
    return
  own = (Line("lm_head.weight", ("unembed",), LINEAR),)
  if config.mtp.draft_vocab:
    mask = TokenMask(config.tokenizer.vocab_size)
    own += (Line("d2t", ("draft_tokens",), TokenOffsets()),)
    own += (Line("t2d", ("draft_tokens",), mask),)
  yield from expand(own, "", "mtp/", (), 0, shapes)


def _embedding(config: Config, shapes: Shapes, mask_token: int = 0) -> Entry:
  """Returns the trunk's embedding, in which a masked kind has its mask as one row.

  EAGLE-3 files lack it: readers use the trunk's.
  """
  kind = config.mtp.kind
  line = Line("embed_tokens.weight", ("embed/embedding",), MATRIX)
  (entry,) = expand((line,), "", "", (), 0, shapes)
  if kind not in MASKS:
    return entry._replace(written=kind == "eagle")
  path, index = MASKS[kind]
  mask = Piece(path, index, shapes[path][len(index) :], VECTOR)
  return entry._replace(row=(mask_token, mask))


def _unembed(config: Config, name: str) -> Line:
  """Returns the line of the trunk's output matrix, repeated in a drafter's file."""
  if config.trunk.tie_embeddings:
    return Line(f"{name}.weight", ("embed/embedding",), MATRIX)
  return Line(f"{name}.weight", ("unembed/kernel",), LINEAR)
