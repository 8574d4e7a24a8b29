"""GPUs by arithmetic, against programs compiled and sums done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import deepseek_v32_671b
from configs import tiny
from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.model import fresh
from dsv32_jax.training import layout
from dsv32_jax.training import optimizer
from dsv32_jax.training import placement
from dsv32_jax.training import run
from pallas_kernels import roofline

H200 = roofline.device("h200")


def build(module, variant, mesh, **changes):
  config = config_files.build(run.TrainConfig, module.get_config(variant))
  mesh = sharding.MeshConfig(**mesh)
  return dataclasses.replace(config, mesh=mesh, **changes)


def large(mesh, **changes):
  return build(deepseek_v32_671b, "sparse", mesh, **changes)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2}, {"expert": 4}])
def test_the_state_is_what_a_device_holds(axes):
  config = build(tiny, "sparse", axes, remat="layer")
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
  model = fresh.fresh_model(config.model, seed=0, dtype=jnp.float32, mesh=mesh)
  _, state = placement.first_state(
    model,
    config.stage,
    optimizer.make_optimizer(config.optimizer),
    mesh,
  )
  held = sum(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
  )
  assert layout.layout(config, H200).argument_bytes_per_device == held


def test_671b_kept_and_traffic_by_hand():
  config = large({"fsdp": 2, "expert": 8, "context": 16}, microbatches=30)
  found = layout.layout(config, H200)
  assert found.tokens_per_device == 8192
  narrow = 2 * (1536 + 512 + 64 + 128) + 4 * (64 + 256)
  kept = 2 * 7168 + 4 * 2048 + narrow
  assert found.kept_bytes_per_device == 8192 * 61 * kept
  more = layout.layout(
    dataclasses.replace(config, remat="save_attention"), H200
  )
  kept += 128 * (2 * 512 + 4)
  assert more.kept_bytes_per_device == 8192 * 61 * kept
  # Six times, 58 layers, 8 experts a token, bfloat16, 7 of 8 elsewhere.
  rows = 6 * 58 * 8192 * 8 * 7168 * 2 * 7 / 8
  assert found.bytes_by_axis["expert"] == pytest.approx(30 * rows)
  # 11.3B weights of experts a layer, a device's eighth, in three passes.
  experts = 3 * 58 * 3 * 7168 * 2048 * 256 / 8 * 2
  assert found.bytes_by_axis["context"] > 30 * experts * 15 / 16
  # What fills a node of eight is the axis that sends the most and fits.
  assert found.node_seconds == pytest.approx(30 * rows / 450e9)


def test_more_devices_need_less_each():
  few = layout.layout(large({"expert": 8, "context": 32}), H200)
  many = layout.layout(large({"fsdp": 4, "expert": 8, "context": 32}), H200)
  assert many.argument_bytes_per_device < few.argument_bytes_per_device / 3
  assert many.product_seconds == pytest.approx(few.product_seconds / 4)


def test_what_cannot_be_counted_is_refused():
  with pytest.raises(ValueError, match="every axis must be given"):
    layout.layout(large({"fsdp": -1}), H200)
  with pytest.raises(ValueError, match="remat='none'"):
    layout.layout(large({"expert": 8}, remat="none"), H200)
