"""Batched greedy decoding of the plain next-token model, one jitted loop.

Legend: B batch, P padded prompt length, S cache slots, V vocab.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.config import Config
from mtp_jax.model.attention import KVCache
from mtp_jax.model.lm import MtpLm, empty_cache, unembed_matrix


class _State(NamedTuple):
  tokens_BS: jax.Array
  length_B: jax.Array
  done_B: jax.Array
  cache: KVCache


def generate(
  params: Any,
  config: Config,
  prompts: Sequence[np.ndarray],
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int],
  prompt_length: int,
  batch_size: int,
) -> list[np.ndarray]:
  """Returns the greedy completion of every prompt, its stop token left out.

  Calls that agree in the keyword sizes, the number of stop ids and `config` share one
  compiled program.

  Args:
    params, config: a plain NTP model; see `model.lm.deployed`.
    prompts: token ids, each of length 1 to `prompt_length`.
    max_new_tokens: longest completion.
    stop_ids: tokens that end a completion.
    prompt_length: prompts are padded to it.
    batch_size: prompts decoded at once.

  Raises:
    ValueError: an empty or too long prompt, or more slots than learned positions.
  """
  slots = prompt_length + max_new_tokens
  if config.trunk.kind == "gpt2" and slots > config.data.seq_len:
    raise ValueError(
      f"prompt_length + max_new_tokens must be at most data.seq_len "
      f"({config.data.seq_len}) with learned positions, got {slots}."
    )
  for prompt in prompts:
    if not 1 <= len(prompt) <= prompt_length:
      raise ValueError(
        f"prompts must have 1 to {prompt_length} tokens, got {len(prompt)}."
      )
  stops = np.asarray(stop_ids, np.int32)
  completions = []
  for first in range(0, len(prompts), batch_size):
    batch = prompts[first : first + batch_size]
    lengths = np.array([len(prompt) for prompt in batch], np.int32)
    tokens = np.zeros((len(batch), slots), np.int32)
    for row, prompt in zip(tokens, batch, strict=True):
      row[: len(prompt)] = prompt
    # Copies of the last prompt fill up the last batch, and are not read.
    missing = ((0, batch_size - len(batch)),)
    lengths = np.pad(lengths, missing, "edge")
    tokens = np.pad(tokens, (*missing, (0, 0)), "edge")
    tokens, ends = multihost_utils.process_allgather(
      _run(config, max_new_tokens, params, tokens, lengths, stops), tiled=True
    )
    for i in range(len(batch)):
      new = tokens[i, lengths[i] : ends[i]]
      completions.append(new[:-1] if new[-1] in stop_ids else new)
  return completions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
  config: Config,
  max_new_tokens: int,
  params: Any,
  tokens_BS: jax.Array,
  prompt_length_B: jax.Array,
  stop_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns `(tokens_BS, length_B)` with the completions, stop tokens included."""
  model, unembed_DV = MtpLm(config), unembed_matrix(params, config)
  rows_B = jnp.arange(tokens_BS.shape[0])
  prompt_length = tokens_BS.shape[1] - max_new_tokens

  def forward(tokens_BT, positions_BT, cache):
    return model.apply(
      {"params": params}, tokens_BT, positions_BT, cache, method=MtpLm.decode
    )

  def append(state: _State, hidden_BD: jax.Array) -> _State:
    logits_BV = jnp.einsum(
      "BD,DV->BV", hidden_BD, unembed_DV, preferred_element_type=jnp.float32
    )
    next_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    length_B = state.length_B + ~state.done_B
    return _State(
      # After its end a row goes on to write one slot, which nobody reads.
      state.tokens_BS.at[rows_B, state.length_B].set(next_B, mode="drop"),
      length_B,
      state.done_B
      | jnp.isin(next_B, stop_ids)
      | (length_B - prompt_length_B >= max_new_tokens),
      state.cache,
    )

  # Prefill: pad tokens leave junk in slots past the prompt, which is overwritten by the
  # real token of that position before any query may look at it.
  positions_BP = jnp.broadcast_to(
    jnp.arange(prompt_length), (tokens_BS.shape[0], prompt_length)
  )
  hidden_BPD, cache = forward(
    tokens_BS[:, :prompt_length],
    positions_BP,
    empty_cache(config, *tokens_BS.shape),
  )
  state = append(
    _State(tokens_BS, prompt_length_B, jnp.zeros_like(rows_B, bool), cache),
    hidden_BPD[rows_B, prompt_length_B - 1],
  )

  def step(state: _State) -> _State:
    last_B1 = (state.length_B - 1)[:, None]
    tokens_B1 = jnp.take_along_axis(state.tokens_BS, last_B1, axis=1)
    hidden_B1D, cache = forward(tokens_B1, last_B1, state.cache)
    return append(state._replace(cache=cache), hidden_B1D[:, 0])

  state = jax.lax.while_loop(lambda s: ~jnp.all(s.done_B), step, state)
  return state.tokens_BS, state.length_B
