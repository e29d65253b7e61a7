"""Drafters: the extra predictors of a trained model, nothing, and given tokens.

At the newest position whose feature is known, `length - 2`, predictor k predicts the
token k + 1 places ahead, which is draft k.

Legend: B batch, S slots, K drafts.
"""

import functools

import jax.numpy as jnp

from mtp_jax import predictors
from mtp_jax.config import Config
from mtp_jax.predictors import kind_of, predictor_trunk
from mtp_jax.predictors.drafting import (
  Choice,
  Choose,
  Drafter,
  Recursion,
  Window,
  take_tokens,
)


def own_predictors(
  config: Config, num_drafts: int | None = None, recurse: bool = False
) -> Drafter:
  """Returns the drafter that a model was trained with.

  Args:
    config: of the model.
    num_drafts: K; None takes all D predictors.
    recurse: where K > D, applies the last predictor again, to its own output. Some
      kinds (EAGLE) do so in any case.

  Raises:
    ValueError: more drafts than there are predictors.
  """
  mtp, kind = config.mtp, kind_of(config.mtp)
  most = predictors.num_drafts(mtp)
  num_drafts = most if num_drafts is None else num_drafts
  if num_drafts < 0:
    raise ValueError(f"num_drafts must be at least 0, got {num_drafts}.")
  can_recurse = kind.is_autoregressive and mtp.depth > 0
  if num_drafts > most and not (can_recurse and (recurse or kind.recurses)):
    hint = "; or set recurse=True" if can_recurse else ""
    raise ValueError(
      f"num_drafts must be at most the model's {most} extra predictor(s) that draft "
      f"(mtp.kind {mtp.kind!r}){hint}; got {num_drafts}."
    )
  if num_drafts == 0:
    return given(0)  # Plain decoding; nothing of a drafter is called then.
  return kind.drafter(predictor_trunk(config.trunk, mtp), mtp, num_drafts)


def own_recursion(config: Config) -> Recursion:
  """Returns the predictor of a model as a drafter that reads its own output.

  Raises:
    ValueError: the predictors of this model cannot read their own output.
  """
  mtp, kind = config.mtp, kind_of(config.mtp)
  found = kind.recursion(predictor_trunk(config.trunk, mtp), mtp)
  if found is None:
    raise ValueError(
      "a drafter that reads its own output must be EAGLE or one sequential "
      "module (mtp.kind 'sequential' with mtp.depth 1 or mtp.share_modules), got "
      f"mtp.kind {mtp.kind!r} with mtp.depth {mtp.depth}."
    )
  return found


@functools.cache
def given(num_drafts: int) -> Drafter:
  """Returns a drafter of known tokens; its weights are drafts_BS by position.

  With the tokens that the target will choose it is an oracle, with others it is always
  wrong: both ends of what a drafter can be.
  """

  def propose(drafts_BS, cache, carry, window: Window, choose: Choose):
    del carry, choose
    ahead_BK = window.length_B[:, None] + jnp.arange(num_drafts)
    known_BK = take_tokens(drafts_BS, ahead_BK)
    return cache, [Choice(known_BK[:, k]) for k in range(num_drafts)]

  return Drafter(
    num_drafts,
    has_distribution=False,
    init=lambda rows, slots: (),
    catch_up=lambda weights, cache, window: (cache, ()),
    propose=propose,
  )
