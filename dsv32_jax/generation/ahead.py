"""A served model's step compiled for devices that need not exist.

Prefill and decode are one program: `new_tokens` of each sequence behind what
its cache holds, and the most likely token behind the last of them.
"""

import dataclasses
import functools
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.ahead import report
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import flops
from dsv32_jax.model import fresh
from dsv32_jax.model import selection

# B sequences, T new tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
  """One step of a served model.

  Attributes:
    model: its shape.
    batch_size: sequences B, over the mesh's data x fsdp x expert.
    max_length: tokens that the cache of a sequence holds.
    new_tokens: tokens T of each sequence a step: 1 decodes, more prefill.
    mesh: devices along each axis.
    dtype: of weights, activations and cache.
    kernels: implementation of the operations, or None for the device's own.
  """

  model: config_lib.ModelConfig
  batch_size: int
  max_length: int
  new_tokens: int
  mesh: sharding.MeshConfig
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  kernels: str | None = None

  def __post_init__(self):
    for name in ("batch_size", "max_length", "new_tokens"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.new_tokens > self.max_length:
      raise ValueError(
        f"new_tokens={self.new_tokens} exceeds max_length={self.max_length}"
      )
    if self.max_length > self.model.max_length:
      raise ValueError(
        f"max_length={self.max_length} exceeds"
        f" model.max_length={self.model.max_length}"
      )


def compile_step(config: ServeConfig, devices) -> tuple[report.Report, object]:
  """Compiles a step at the end of a full cache.

  Args:
    config: its mesh must fit the devices.
    devices: of this process or of a topology description.

  Returns:
    The report and the compiled step.

  Raises:
    ValueError: if the mesh does not fit the devices, or the sequences do not
      divide over it.
    report.DoesNotFit: if the step needs more memory than a device has.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  shards = sharding.batch_shards(mesh)
  if config.batch_size % shards:
    raise ValueError(
      f"batch_size={config.batch_size} does not divide over the {shards}"
      " shards of data x fsdp x expert"
    )
  with jax.set_mesh(mesh):
    model = fresh.abstract_model(config.model, dtype=jnp.dtype(config.dtype))
    model.mtp = None
    graph, abstract = nnx.split(model)
    state = sharding.placed(abstract, mesh)
    options = attention.AttentionOptions(
      select=selection.TopK(config.model.index_top_k), kernels=config.kernels
    )
    step = jax.jit(functools.partial(_step, graph, options), donate_argnums=1)
    shape = (config.batch_size, config.new_tokens)
    tokens_BT = jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=sharding.batch_sharding(mesh, shape)
    )
    cache = _abstract_cache(config, mesh)
    return report.compile_program(
      lambda: step.trace(state, cache, tokens_BT), mesh.size, counts(config)
    )


def counts(config: ServeConfig) -> dict:
  """Returns what a report says of a step before it is compiled."""
  held = config.max_length - config.new_tokens
  counted = flops.forward_flops(
    config.model, config.batch_size, held, config.new_tokens
  )
  return {
    "model_flops_per_step": sum(counted),
    "flops_by_part": counted._asdict(),
    "global_batch": config.batch_size,
    "sequence_length": config.max_length,
  }


def _abstract_cache(config, mesh):
  cache = jax.eval_shape(
    lambda: cache_lib.empty_cache(
      config.model,
      config.batch_size,
      config.max_length,
      dtype=jnp.dtype(config.dtype),
    )
  )

  def described(axis, leaf):
    axes = (None,) * axis + ("batch",)
    axes += (None,) * (len(leaf.shape) - len(axes))
    spec = sharding.partition_spec(leaf.shape, axes, mesh)
    layout = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

  # A stack's layers come before its sequences.
  return cache._replace(
    dense=jax.tree.map(functools.partial(described, 1), cache.dense),
    moe=jax.tree.map(functools.partial(described, 1), cache.moe),
    length_B=described(0, cache.length_B),
  )


def _step(graph, options, state, cache, tokens_BT):
  model = nnx.merge(graph, state)
  output = model(tokens_BT, cache=cache, options=options, with_logits=False)
  logits_BV = model.head(output.hidden[:, -1:])[:, 0]
  return jnp.argmax(logits_BV, axis=-1), output.cache
