"""Batched greedy decoding of the plain next-token model, one jitted loop.

Legend: B batch, P padded prompt length, S cache slots, V vocab.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config
from mtp_jax.model.lm import MtpLm, empty_cache, unembed_matrix


class _State(NamedTuple):
  tokens_BS: jax.Array
  length_B: jax.Array
  done_B: jax.Array
  cache: Any


def generate(
  params: Any,
  config: Config,
  prompts: list[np.ndarray],
  max_new_tokens: int,
  stop_ids: tuple[int, ...],
  prompt_length: int,
) -> list[np.ndarray]:
  """Returns the greedy completion of every prompt, its stop token left out.

  Args:
    params, config: a plain NTP model; see `model.lm.deployed`.
    prompts: token ids, each of length 1 to `prompt_length`.
    max_new_tokens: longest completion.
    stop_ids: tokens that end a completion.
    prompt_length: prompts are padded to it, so that one program serves all.

  Raises:
    ValueError: an empty or too long prompt, or more slots than learned positions.
  """
  lengths = np.array([len(prompt) for prompt in prompts])
  if len(prompts) == 0:
    return []
  if lengths.min() < 1 or lengths.max() > prompt_length:
    raise ValueError(
      f"prompts must have 1 to {prompt_length} tokens, got {lengths.min()} to "
      f"{lengths.max()}."
    )
  slots = prompt_length + max_new_tokens
  if config.trunk.kind == "gpt2" and slots > config.data.seq_len:
    raise ValueError(
      f"prompt_length + max_new_tokens must be at most data.seq_len "
      f"({config.data.seq_len}) with learned positions, got {slots}."
    )
  tokens = np.zeros((len(prompts), slots), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  state = _run(config, max_new_tokens, prompt_length, stop_ids, params, tokens, lengths)
  tokens, ends = np.asarray(state.tokens_BS), np.asarray(state.length_B)
  completions = []
  for row, begin, end in zip(tokens, lengths, ends, strict=True):
    new = row[begin:end]
    completions.append(new[:-1] if len(new) and new[-1] in stop_ids else new)
  return completions


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
  config: Config,
  max_new_tokens: int,
  prompt_length: int,
  stop_ids: tuple[int, ...],
  params: Any,
  tokens_BS: jax.Array,
  prompt_length_B: jax.Array,
) -> _State:
  model, unembed_DV = MtpLm(config), unembed_matrix(params, config)
  rows_B = jnp.arange(tokens_BS.shape[0])
  stops = jnp.asarray(stop_ids, jnp.int32)

  def forward(tokens_BT, positions_BT, cache):
    return model.apply(
      {"params": params}, tokens_BT, positions_BT, cache, method=MtpLm.decode
    )

  def append(state: _State, hidden_BD: jax.Array) -> _State:
    logits_BV = jnp.einsum(
      "BD,DV->BV", hidden_BD, unembed_DV, preferred_element_type=jnp.float32
    )
    next_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    slot_B = jnp.where(state.done_B, state.tokens_BS.shape[1], state.length_B)
    length_B = state.length_B + ~state.done_B
    return _State(
      state.tokens_BS.at[rows_B, slot_B].set(next_B, mode="drop"),
      length_B,
      state.done_B
      | jnp.isin(next_B, stops)
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
    _State(
      jnp.asarray(tokens_BS),
      jnp.asarray(prompt_length_B, jnp.int32),
      jnp.zeros(tokens_BS.shape[0], bool),
      cache,
    ),
    hidden_BPD[rows_B, prompt_length_B - 1],
  )

  def step(state: _State) -> _State:
    last_B1 = (state.length_B - 1)[:, None]
    tokens_B1 = jnp.take_along_axis(state.tokens_BS, last_B1, axis=1)
    hidden_B1D, cache = forward(tokens_B1, last_B1, state.cache)
    return append(state._replace(cache=cache), hidden_B1D[:, 0])

  return jax.lax.while_loop(lambda s: ~jnp.all(s.done_B), step, state)
