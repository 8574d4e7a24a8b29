"""Floors against counts made pair by pair and figures worked out by hand."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels import cases
from pallas_kernels import problems
from pallas_kernels import roofline


def real(operation, name):
  return next(
    c
    for c in cases.BENCHMARKS["real"]
    if (c.operation, c.name) == (operation, name)
  )


def test_pairs_are_those_that_are_drawn():
  for table in (cases.CHECKS, cases.BENCHMARKS["small"]):
    for case in table:
      if case.ragged:
        continue
      arrays = problems.draw(case, case.dtypes[0])
      if "indices" in arrays:
        counted = np.sum(np.asarray(arrays["indices"]) >= 0)
      elif "slots" in arrays:
        counted = np.sum(np.asarray(arrays["slots"]) + 1)
      elif "lengths" in arrays:
        counted = np.sum(np.asarray(arrays["lengths"]))
      else:
        counted = arrays["experts"].size
      assert roofline.pairs(case) == counted, case


@pytest.mark.parametrize(
  "operation, name, direction, flops",
  [
    # 2048 queries see 30721 to 32768 keys; 64 heads of 128.
    ("index_select", "prefill_32k", "forward", 65012736 * 2 * 64 * 128),
    # 4096 * 4097 / 2 pairs, 16 heads of 192 and 128.
    ("masked_attention", "train_4k", "forward", 8390656 * 2 * 16 * 320),
    (
      "masked_attention",
      "train_4k",
      "forward_backward",
      8390656 * 2 * 16 * (320 + 3 * 192 + 2 * 128),
    ),
    # 512 queries of 2048 keys: 570 million a query, 1.44 billion backward.
    ("sparse_mla", "prefill_32k", "forward", 512 * 2048 * 2 * 128 * 1088),
    (
      "sparse_mla",
      "prefill_32k",
      "forward_backward",
      512 * 2048 * 2 * 128 * (1088 + 3 * 576 + 2 * 512),
    ),
    ("expert_ffn", "share", "forward", 4096 * 8 * 6 * 7168 * 2048),
    ("expert_ffn", "share", "forward_backward", 4096 * 8 * 18 * 7168 * 2048),
    (
      "indexer_kl",
      "dense_4k",
      "forward_backward",
      6292480 * 2 * (16 * 192 + 3 * 64 * 128),
    ),
  ],
)
def test_operations_by_hand(operation, name, direction, flops):
  case = real(operation, name)
  assert roofline.work(case, "bfloat16", direction).flops == flops


def test_bytes_by_hand():
  # 128 heads of 576 in and 512 out, keys of 576, lists of 2048, an lse a head.
  case = real("sparse_mla", "decode_32k")
  rows = 16
  inputs = 2 * (rows * 128 * 576 + rows * 32768 * 576) + 4 * rows * 2048
  results = rows * 128 * (2 * 512 + 4)
  assert roofline.work(case, "bfloat16", "forward").bytes == inputs + results
  both = roofline.work(case, "bfloat16", "forward_backward").bytes
  assert both == inputs + results + 2 * (rows * 128 + rows * 32768) * 576


def test_the_floor_is_the_longer_of_products_and_bytes():
  h200 = roofline.device("NVIDIA H200")
  assert h200.name == "h200"
  products = roofline.Work(flops=989 * 10**12, bytes=1)
  assert roofline.floor_seconds(products, "bfloat16", h200) == 1.0
  moved = roofline.Work(flops=1, bytes=48 * 10**11)
  assert roofline.floor_seconds(moved, "bfloat16", h200) == 1.0
  assert roofline.floor_seconds(moved, "int4", h200) is None
  without = dataclasses.replace(h200, bytes=None)
  assert roofline.floor_seconds(moved, "bfloat16", without) < 1e-9


def test_devices_are_found_by_kind():
  kinds = {
    "NVIDIA H100 80GB HBM3": "h100",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "7x",
    "v5p": "v5p",
  }
  for kind, name in kinds.items():
    assert roofline.device(kind).name == name
  assert roofline.device("cpu") is None


def test_minimum_of_the_matrix_unit():
  # One query of 2048 keys and 128 heads: 128 * 2048 * 1088 multiply-adds are
  # 4352 bundles of 4 x 128 x 128, 1088 of 4 x 256 x 256.
  case = dataclasses.replace(real("sparse_mla", "prefill_32k"), queries=1)
  count = {
    generation: roofline.mxu_bundles(case, "forward", generation, False)
    for generation in roofline.MXU
  }
  assert count == {"v5e": 4352, "v5p": 4352, "v6e": 1088, "7x": 1088}
  # 576 is padded to 640 or 768.
  padded = roofline.mxu_bundles(case, "forward", "v5p", True)
  assert padded == 4 * (640 + 512)
  padded = roofline.mxu_bundles(case, "forward", "7x", True)
  assert padded == 768 + 512
  with pytest.raises(ValueError, match="sideways"):
    roofline.products(case, "sideways")
