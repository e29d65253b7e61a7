"""Import and export of Hugging Face model folders (safetensors, without torch).

  model = interop.read_model(folder)                  # config.json and headers only
  config = with_overrides(config, model.overrides)
  params = interop.load_params(model, config, mesh)   # into the sharded layout

  params["mtp"] = interop.read_drafter(folder, config, params, mesh)

  interop.stitch(params, config, folder, out)         # MTP layers alone are new

  interop.layouts_for(config)                         # {"llama": "", "gpt2": "why not"}
  interop.export_params(params, config, folder, "llama")
"""

from mtp_jax.interop.drafter_config import layouts_for
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.exporting import export_params
from mtp_jax.interop.hf_config_writing import ID_KEYS
from mtp_jax.interop.importing import HfModel, load_params, read_drafter, read_model
from mtp_jax.interop.layouts import DRAFTERS
from mtp_jax.interop.stitching import stitch

__all__ = [
  "DRAFTERS",
  "ID_KEYS",
  "HfModel",
  "InteropError",
  "export_params",
  "layouts_for",
  "load_params",
  "read_drafter",
  "read_model",
  "stitch",
]
