"""The oracle against recorded runs of the official computation.

The folder with the checkpoints and arrays is $DSV32_ORACLE, else
../shared/oracle beside the repository. Its fixtures are float32 results, so
the oracle's float64 answers differ from them by float32 rounding.

Axes as in oracle_ops.py.
"""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from tests.support import oracle
from tests.support import oracle_checkpoint
from tests.support import oracle_layers
from tests.support import oracle_ops

pytestmark = pytest.mark.parity

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Set by those who recorded the arrays, relative to the largest entry.
MODEL_TOLERANCE = 1e-4
FP8_INDEX_TOLERANCE = 1e-3
OPS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder():
  path = pathlib.Path(
    os.environ.get("DSV32_ORACLE", REPOSITORY.parent / "shared" / "oracle")
  )
  if not path.is_dir():
    pytest.skip(f"{path} is not there; set DSV32_ORACLE")
  return path


@pytest.fixture(scope="module")
def ops(folder):
  with np.load(folder / "ops_realdims.npz") as arrays:
    return {
      name: value.astype(np.float64) if value.dtype == np.float32 else value
      for name, value in arrays.items()
    }


def assert_matches(name, got, want, tolerance):
  """Equal if not float; else within tolerance of the largest finite |want|."""
  assert got.shape == want.shape, name
  if want.dtype.kind != "f":
    np.testing.assert_array_equal(got, want, err_msg=name)
    return
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
  error = np.abs(got[finite] - want[finite]).max()
  assert error <= tolerance * np.abs(want[finite]).max(), (name, error)


@pytest.mark.parametrize(
  ("run", "checkpoint"),
  [
    ("A_fp32_sparse", "tiny_bf16"),
    ("A_fp32_dense_short", "tiny_bf16"),
    ("B_fp8w_dequant_fp32", "tiny_fp8"),
  ],
)
@pytest.mark.parametrize(
  "attend",
  [oracle_layers.attention_expanded, oracle_layers.attention_absorbed],
)
def test_model_run(folder, run, checkpoint, attend):
  config, tensors = oracle_checkpoint.load_checkpoint(folder / checkpoint)
  with np.load(folder / f"{run}.npz") as arrays:
    want = dict(arrays)
  got = oracle.forward(config, tensors, want.pop("input_ids"), attend=attend)
  prefill = int(want.pop("decode_prefill_len"))
  got["decode_logits"] = got["logits"][:, prefill - 1 :]
  got["decode_index_scores"] = got["index_scores"][:, :, prefill:]
  got["decode_topk_mask"] = got["topk_mask"][:, :, prefill:]
  assert len(want) == 18
  for name, value in want.items():
    assert_matches(name, got[name], value, MODEL_TOLERANCE)


def test_dense_attention_where_top_k_is_the_length(folder):
  config, tensors = oracle_checkpoint.load_checkpoint(folder / "tiny_bf16")
  with np.load(folder / "A_fp32_dense_short.npz") as arrays:
    ids_BT, want = arrays["input_ids"], arrays["logits"]
  got = oracle.forward(config, tensors, ids_BT, sparse=False)["logits"]
  assert_matches("logits", got, want, MODEL_TOLERANCE)


def test_mtp_run(folder):
  config, tensors = oracle_checkpoint.load_checkpoint(folder / "tiny_bf16")
  with np.load(folder / "A_fp32_sparse.npz") as arrays:
    ids_BT = arrays["input_ids"]
  with np.load(folder / "A_fp32_mtp.npz") as arrays:
    want = arrays["mtp_logits_postnorm"]
  main = oracle.forward(config, tensors, ids_BT)
  got, _ = oracle.mtp_forward(config, tensors, main["final_norm"], ids_BT)
  assert_matches("mtp_logits_postnorm", got, want, MODEL_TOLERANCE)


def test_fp8_index_run(folder):
  config, tensors = oracle_checkpoint.load_checkpoint(folder / "tiny_fp8")
  with np.load(folder / "B_fp8index_fp32.npz") as arrays:
    want = dict(arrays)
  got = oracle.forward(
    config,
    tensors,
    want["input_ids"],
    score_pairs=oracle_ops.index_scores_quantised,
  )
  # Later layers have ties between exact zeros; only the first is comparable.
  for name in ("index_scores", "topk_mask"):
    assert_matches(name, got[name][0], want[name][0], FP8_INDEX_TOLERANCE)


@pytest.mark.parametrize(
  ("kind", "power_of_two"), [("plain", False), ("ue8m0", True)]
)
def test_act_quant_bits(ops, kind, power_of_two):
  values_X, scale_Q = oracle_ops.act_quant(
    ops["aq_x"], power_of_two=power_of_two
  )
  bits_X = values_X.view(np.uint8)
  np.testing.assert_array_equal(bits_X, ops[f"aq_{kind}_y_bits"])
  np.testing.assert_array_equal(scale_Q, ops[f"aq_{kind}_s"])
  np.testing.assert_array_equal(values_X.astype(float), ops[f"aq_{kind}_y"])


def test_fp8_matmul(ops):
  weight_OX = oracle_ops.dequantise_weight(
    ops["gemm_w_bits"].view(ml_dtypes.float8_e4m3fn), ops["gemm_w_scale_inv"]
  )
  np.testing.assert_array_equal(weight_OX, ops["gemm_w_dequant"])
  values_X, scale_Q = oracle_ops.act_quant(ops["gemm_a"])
  got = oracle_ops.dequantise_rows(values_X, scale_Q) @ weight_OX.T
  assert_matches("gemm_out", got, ops["gemm_out"], OPS_TOLERANCE)


def test_index_scores_and_hadamard(ops):
  arrays = ops["idx_q"], ops["idx_k"], ops["idx_w"]
  got = oracle_ops.index_scores(*arrays)
  assert_matches("exact", got, ops["idx_score_exact"], OPS_TOLERANCE)
  got = oracle_ops.index_scores_fp8(*arrays)
  assert_matches("fp8", got, ops["idx_score_fp8"], OPS_TOLERANCE)
  got = oracle_ops.hadamard(ops["had_x"])
  assert_matches("hadamard", got, ops["had_y"], OPS_TOLERANCE)


def test_rotary_embedding(ops):
  args = {
    "theta": 1e4,
    "original_length": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
  }
  got = oracle_ops.yarn_bounds(64, **args)
  np.testing.assert_array_equal(got, ops["yarn_low_high"])
  got = oracle_ops.yarn_frequencies(64, factor=40.0, **args)
  want_P = ops["yarn_inv_freq"]
  np.testing.assert_allclose(got, want_P, rtol=OPS_TOLERANCE, atol=0.0)
  scale = oracle_ops.attention_scale(192, factor=40.0)
  np.testing.assert_allclose(scale, ops["softmax_scale_real"], rtol=1e-12)
  # Far positions magnify float32 rounding; the recorded angles have it.
  position_T1 = ops["yarn_pos"].astype(np.float32)[:, None]
  angle_TP = (position_T1 * want_P.astype(np.float32)).astype(np.float64)
  assert_matches("cos", np.cos(angle_TP), ops["yarn_cos"], OPS_TOLERANCE)
  assert_matches("sin", np.sin(angle_TP), ops["yarn_sin"], OPS_TOLERANCE)
  angle_1T1P = angle_TP[None, :, None]
  for name, rotate in (
    ("rope_interleaved", oracle_ops.rope_interleaved),
    ("rope_half", oracle_ops.rope_half_split),
  ):
    got = rotate(ops["rope_x"], angle_1T1P)
    assert_matches(name, got, ops[name], OPS_TOLERANCE)


def test_router(ops):
  affinity_BTE = oracle_layers.router_affinity(
    ops["gate_x"][None], ops["gate_weight"].T
  )
  experts_BTA = oracle_layers.select_experts(
    affinity_BTE,
    ops["gate_bias"],
    num_groups=8,
    groups_kept=4,
    experts_per_token=8,
  )
  got_BTE = oracle_layers.combine_weights(
    affinity_BTE, experts_BTA, normalize=True, routed_scale=2.5
  )
  assert_matches("gate_dense", got_BTE[0], ops["gate_dense"], OPS_TOLERANCE)
  np.testing.assert_array_equal(got_BTE[0] > 0, ops["gate_dense"] > 0)


def test_norms(ops):
  got = oracle_ops.rms_norm(ops["norm_x"], ops["rms_w"])
  assert_matches("rms_y", got, ops["rms_y"], OPS_TOLERANCE)
  got = oracle_ops.layer_norm(ops["norm_x"], ops["ln_w"], ops["ln_b"])
  assert_matches("ln_y", got, ops["ln_y"], OPS_TOLERANCE)
