"""Run folders that nobody trained: random weights in a checkpoint."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mtp_jax.checkpoint import Checkpointer, fingerprint
from mtp_jax.config import Config, to_dict
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.files import write_json
from mtp_jax.train_state import TrainState, empty_interval
from tests import common


def save_run(workdir: Path, config: Config, params: Any = None) -> Path:
  """Fills a run folder with what decoding needs of it; returns the folder."""
  zero = jnp.zeros((), jnp.int32)
  params = common.random_params(config) if params is None else params
  params = jax.tree.map(jnp.asarray, params)
  interval = empty_interval(config)
  state = TrainState(zero, params, (), interval, zero, zero)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      "mtp_jax.checkpoint.fingerprint", jax.jit(fingerprint.__wrapped__)
    )
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, config, ByteTokenizer().to_json(), {}, {})
    checkpointer.close()
  write_json(workdir / "config.json", to_dict(config))
  return workdir
