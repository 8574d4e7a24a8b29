"""Settings that must stand before JAX starts: eight CPU devices, a cache."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# Tests of meshes need devices; other tests run on the first one.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax")
)
os.environ.setdefault("MPLBACKEND", "Agg")
