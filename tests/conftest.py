"""Settings that must stand before JAX starts: eight CPU devices, a cache."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# Tests of meshes need devices; other tests run on the first one.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if "PYTEST_XDIST_WORKER" in os.environ:
  # Where tests run side by side, threads inside one only get in the way.
  os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax")
)
# Most programs of the tests compile faster than the default limit of a second.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("MPLBACKEND", "Agg")

from absl import flags  # noqa: E402  after the settings above
import jax  # noqa: E402
import pytest  # noqa: E402

_define = flags.FlagValues.__setitem__


def _define_again(values, name, flag):
  """Lets a program define what another one did: tests import several."""
  flag.allow_override = True
  _define(values, name, flag)


flags.FlagValues.__setitem__ = _define_again


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
  """Frees what a module compiled: kept, it adds up to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def flags_of_one_test():
  """Forgets flags that a test defined, and that it marked others required.

  absl keeps one set of flags a process; programs share names in it.
  """
  before = {name: list(flags.FLAGS[name].validators) for name in flags.FLAGS}
  yield
  for name in list(flags.FLAGS):
    if name in before:
      flags.FLAGS[name].validators[:] = before[name]
    else:
      delattr(flags.FLAGS, name)
