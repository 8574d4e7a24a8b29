"""What the fronts share: choosing an implementation, interpreting a TPU's."""

import functools
import importlib

from jax.experimental.pallas import tpu as pltpu

# Memory reads as NaN until it is written, and concurrent accesses are reported.
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def interpreted(kernel):
  """Returns a TPU implementation that the interpreter runs on any device."""
  return functools.partial(kernel, interpret=INTERPRET)


def at_first_call(package: str, module: str, name: str):
  """Returns a function whose module is imported when it is called.

  For kernels of GPUs: their language takes most of a second to import.
  """

  def call(*arguments, **named):
    found = importlib.import_module(f"{package}.{module}")
    return getattr(found, name)(*arguments, **named)

  return call


def refuse_empty(*arrays):
  """Raises ValueError if an axis of an array (or None) holds nothing."""
  for array in arrays:
    if array is not None and 0 in array.shape:
      raise ValueError(f"an array of shape {array.shape} has an empty axis")


def choose(implementations, implementation: str | None) -> str:
  """Returns the name of the implementation to use; None is "xla".

  Args:
    implementations: the names there are.
    implementation: one of them, or None.

  Raises:
    ValueError: if it is none of them.
  """
  name = "xla" if implementation is None else implementation
  if name not in implementations:
    raise ValueError(f"{implementation=} is not one of {list(implementations)}")
  return name
