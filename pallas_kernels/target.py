"""The device that kernels are traced for, where it is not the default one."""

from collections.abc import Iterator
import contextlib
import contextvars

import jax

_KIND = contextvars.ContextVar("kind", default=None)


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
  """Traces kernels for another device: of a topology description, say.

  What was traced before under `jax.jit` stays as it is.
  """
  token = _KIND.set(device.device_kind)
  try:
    yield
  finally:
    _KIND.reset(token)


def device_kind() -> str:
  """Returns `jax.Device.device_kind` of the device that kernels are for."""
  return _KIND.get() or jax.devices()[0].device_kind
