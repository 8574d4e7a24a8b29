"""What a stage's step needs of GPUs in nodes, by arithmetic alone.

Nothing is compiled: no compiler for a cluster of GPUs runs without them. The
state is exact, from the sharding rules; what a layer keeps for its backward
pass is counted; what else is alive is taken from the step that was compiled
for TPUs (REST), in proportion to the tokens of a device. Traffic is counted by
hand and split by the links that it takes: those mesh axes lie inside a node
that fit there and send the most.
"""

import itertools
import math
from typing import NamedTuple

import jax
from jax.sharding import AxisType

from dsv32_jax import sharding
from dsv32_jax.model import flops
from dsv32_jax.training import run
from dsv32_jax.training import step_flops
from pallas_kernels import roofline

# The sparse 671B step on v5p:8x8x16 at 4096 tokens a device: 40.9 GiB at the
# peak, of which 7.0 are state, 3.5 gradients, 12.9 kept by layers.
_GIB = 2**30
_REST_BYTES_PER_TOKEN = 17.5 * _GIB / 4096
# Of one direction, a GPU: NVLink 4 (900 GB/s both ways), and one 400 Gb/s port
# of InfiniBand, as in NVIDIA's DGX H200 data sheet.
_NODE_DEVICES = 8
_NVLINK_BYTES, _PORT_BYTES = 450e9, 50e9
# Dispatch and combine, each forward, again for the backward, and backward.
_EXCHANGES = 6
# Weights are gathered forward and for the backward; their gradient goes back.
_WEIGHT_PASSES = 3
ASSUMES = (
  "memory beyond state, gradients and kept activations as on TPU, in proportion"
  " to tokens; balanced experts; every product in bfloat16 at the peak; every"
  " byte at the peak of its link, none hidden behind products"
)


class Layout(NamedTuple):
  """Per device, in bytes and seconds of one step.

  Attributes:
    argument_bytes_per_device: state, exact.
    gradient_bytes_per_device: float32, of what trains.
    kept_bytes_per_device: by layers for their backward pass.
    peak_bytes_per_device: all, with the rest.
    tokens_per_device: of a microbatch.
    bytes_by_axis: sent along each mesh axis.
    node_seconds: of what stays inside a node.
    network_seconds: of what leaves it.
    product_seconds: of the model's products at the peak.
    step_seconds: all three, one after the other.
    mfu: share of the peak.
    assumes: what has to hold, as text.
  """

  argument_bytes_per_device: int
  gradient_bytes_per_device: int
  kept_bytes_per_device: int
  peak_bytes_per_device: int
  tokens_per_device: int
  bytes_by_axis: dict[str, float]
  node_seconds: float
  network_seconds: float
  product_seconds: float
  step_seconds: float
  mfu: float
  assumes: str


def layout(config: run.TrainConfig, device: roofline.Device) -> Layout:
  """Counts what a step needs.

  Args:
    config: the stage; its mesh must name every axis (no -1).
    device: peaks of a GPU.

  Raises:
    ValueError: if the mesh has a -1, or the stage keeps everything
      (`remat="none"`), whose memory nobody counted.
  """
  mesh = abstract_mesh(config.mesh)
  if config.remat == "none":
    raise ValueError("remat='none': only rematerialised layers are counted")
  _, state = run.abstract_state(config, mesh)
  trained = bytes_per_device(state.trained)
  item = {"float32": 4, "bfloat16": 2}[config.parameter_dtype]
  tokens = config.data.batch_size * config.data.sequence_length
  tokens //= config.microbatches * mesh.size
  state_bytes, gradients = bytes_per_device(state), trained * 4 // item
  kept = tokens * config.model.num_layers * _kept_per_token(config)
  peak = state_bytes + gradients + kept + int(tokens * _REST_BYTES_PER_TOKEN)
  sent = _sent(config, mesh, tokens)
  inside = _inside(mesh, sent)
  node = sum(sent[axis] for axis in inside) / _NVLINK_BYTES
  outside = sum(sent[axis] for axis in sent if axis not in inside)
  network = outside / _PORT_BYTES
  model = step_flops.count(
    config.model,
    config.stage,
    config.data.batch_size,
    config.data.sequence_length,
  ).total
  products = model / (mesh.size * device.flops["bfloat16"])
  seconds = products + node + network
  return Layout(
    argument_bytes_per_device=state_bytes,
    gradient_bytes_per_device=gradients,
    kept_bytes_per_device=kept,
    peak_bytes_per_device=peak,
    tokens_per_device=tokens,
    bytes_by_axis=sent,
    node_seconds=node,
    network_seconds=network,
    product_seconds=products,
    step_seconds=seconds,
    mfu=products / seconds,
    assumes=ASSUMES,
  )


def abstract_mesh(config: sharding.MeshConfig) -> jax.sharding.AbstractMesh:
  """The mesh of a config over devices that nobody names.

  Raises:
    ValueError: if an axis is -1.
  """
  sizes = tuple(getattr(config, axis) for axis in sharding.AXES)
  if -1 in sizes:
    raise ValueError(f"mesh={sizes}: every axis must be given")
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=kinds)


def bytes_per_device(tree) -> int:
  """Bytes of a tree of jax.ShapeDtypeStruct with shardings, on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _kept_per_token(config) -> int:
  """Bytes that a layer keeps of a token, in bfloat16; see run.REMAT."""
  model = config.model
  kept = 2 * model.width
  if config.remat == "layer":
    return kept
  kept += 4 * (config.stage.top_k or model.index_top_k)
  kept += 2 * (model.query_latent_width + model.latent_width)
  kept += 2 * (model.rope_width + model.index_width)
  kept += 4 * (model.index_heads + model.num_experts)
  if config.remat == "save_attention":
    # In gathered form, with the logarithm of the sum.
    kept += model.num_heads * (2 * model.latent_width + 4)
  return kept


def _sent(config, mesh, tokens) -> dict[str, float]:
  """Bytes that a device receives in a step, by mesh axis."""
  model, size = config.model, mesh.shape
  moe_layers = model.num_layers - model.num_dense_layers
  away = {axis: 1 - 1 / size[axis] for axis in sharding.AXES}
  row = model.experts_per_token * model.width * 2
  exchanged = _EXCHANGES * moe_layers * tokens * row
  expert = 3 * model.width * model.expert_width * model.num_experts
  # Of the layers' other weights each device of the expert axis needs all.
  counts = flops.active_parameters(model)
  others = counts["attention"] + counts["indexer"] + 2 * counts["head"]
  weights = 2 * (moe_layers * expert / size["expert"] + others)
  weights *= _WEIGHT_PASSES / size["tensor"]
  # The last axis to be gathered brings most; the others a part of it.
  shared = weights * away["context"]
  first = weights / size["context"] * away["fsdp"]
  latents = model.latent_width + model.rope_width + model.index_width
  visible = tokens * size["context"] * size["tensor"]
  rows = 3 * model.num_layers * visible * latents * 2
  per_microbatch = {
    "data": 0.0,
    "fsdp": first,
    "expert": exchanged * away["expert"],
    "context": shared + rows * away["context"],
    "tensor": rows * away["tensor"],
  }
  sent = {
    axis: config.microbatches * count for axis, count in per_microbatch.items()
  }
  # Gradients of what is copied there, float32, once a step.
  sent["data"] = 2 * away["data"] * 2 * weights / _WEIGHT_PASSES
  return sent


def _inside(mesh, sent) -> tuple[str, ...]:
  """The axes to lay inside a node, so that the least leaves it."""
  fitting = [
    axes
    for count in range(len(sharding.AXES) + 1)
    for axes in itertools.combinations(sharding.AXES, count)
    if _NODE_DEVICES % math.prod(mesh.shape[axis] for axis in axes) == 0
  ]
  return max(fitting, key=lambda axes: sum(sent[axis] for axis in axes))
