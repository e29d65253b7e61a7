"""The config that every experiment states its difference from: all defaults.

They are a small Llama-style byte model on the Python standard library's own source: it
trains in about a minute on two CPU cores. The default of a key stands in the key's line
(`mtp_jax/sections.py`, `mtp_jax/model_sections.py`), with its meaning and range.
"""

from ml_collections import ConfigDict

from mtp_jax.config import defaults


def get_config() -> ConfigDict:
  return ConfigDict(defaults())
