"""experiments.score: what it writes, and what it says of a mistake."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import weights
from dsv32_jax.training import model_checkpoint
from experiments import common
from experiments import score
from tests.support import models
from tests.support import tolerances

BATCH, LENGTH, PREFILL = 2, 11, 7


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("score") / "hf"
  weights.save_hf(model, path, dtype=jnp.float32)
  return path


@pytest.fixture
def token_path(tmp_path):
  path = tmp_path / "ids.npy"
  np.save(path, models.random_tokens((BATCH, LENGTH)))
  return path


def run(*arguments):
  common.parse_flags(arguments)
  score.main([])


def run_to(output, *arguments):
  run(*arguments, f"--output={output}")
  with np.load(output, allow_pickle=False) as arrays:
    return dict(arrays)


def test_writes_every_array(model, checkpoint, token_path, tmp_path):
  got = run_to(
    tmp_path / "out.npz",
    f"--hf_checkpoint={checkpoint}",
    f"--token_ids={token_path}",
    "--capture",
    "--mtp",
    f"--prefill_length={PREFILL}",
  )
  config = model.config
  layers, vocab, width = config.num_layers, config.vocab_size, config.width
  tokens, square = (BATCH, LENGTH), (layers, BATCH, LENGTH, LENGTH)
  decoded = LENGTH - PREFILL
  shapes = dict(
    input_ids=tokens,
    logits=(*tokens, vocab),
    final_norm=(*tokens, width),
    hidden_states=(layers + 1, *tokens, width),
    attn_out=(layers, *tokens, width),
    ffn_out=(layers, *tokens, width),
    index_scores=square,
    topk_mask=square,
    route_weights=(config.num_moe_layers, *tokens, config.num_experts),
    l0_qr=(*tokens, config.query_latent_width),
    l0_q_pe=(*tokens, config.num_heads, config.rope_width),
    l0_k_pe=(*tokens, config.rope_width),
    l0_kv_latent=(*tokens, config.latent_width),
    l0_idx_q=(*tokens, config.index_heads, config.index_width),
    l0_idx_k=(*tokens, config.index_width),
    l0_idx_w=(*tokens, config.index_heads),
    decode_prefill_len=(),
    decode_logits=(BATCH, decoded + 1, vocab),
    decode_index_scores=(layers, BATCH, decoded, LENGTH),
    decode_topk_mask=(layers, BATCH, decoded, LENGTH),
    mtp_logits_postnorm=(BATCH, LENGTH - 1, vocab),
  )
  assert {name: value.shape for name, value in got.items()} == shapes
  assert got["logits"].dtype == got["decode_logits"].dtype == np.float32
  assert got["topk_mask"].dtype == got["decode_topk_mask"].dtype == bool
  tolerances.assert_close(
    got["decode_logits"], got["logits"][:, PREFILL - 1 :], "float32"
  )
  np.testing.assert_array_equal(
    got["decode_topk_mask"], got["topk_mask"][:, :, PREFILL:]
  )
  hidden = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  assert np.isneginf(got["index_scores"][..., hidden]).all()
  assert np.isfinite(got["index_scores"][..., ~hidden]).all()


def test_scores_an_orbax_checkpoint(model, token_path, tmp_path):
  model_checkpoint.save_model(model, tmp_path / "orbax")
  got = run_to(
    tmp_path / "out.npz",
    f"--checkpoint={tmp_path / 'orbax'}",
    f"--token_ids={token_path}",
  )
  assert set(got) == {"logits", "input_ids"}
  want = model(models.random_tokens((BATCH, LENGTH))).logits
  tolerances.assert_close(got["logits"], want, "float32")


@pytest.mark.parametrize(
  ("token_ids", "message"),
  [
    (np.zeros((2, 3), np.float32), "want integers"),
    (np.zeros(3, np.int32), "want integers"),
    (np.zeros((0, 3), np.int32), "empty"),
    (np.full((1, 3), 61), "outside the vocabulary"),
    (np.full((1, 3), -1), "outside the vocabulary"),
    (np.array([["a", "b"]]), "want integers"),
    (np.array([[None]]), "pickle"),
  ],
)
def test_bad_token_ids(checkpoint, tmp_path, token_ids, message):
  path = tmp_path / "ids.npy"
  np.save(path, token_ids)
  with pytest.raises(ValueError, match=message) as error:
    run_to(
      tmp_path / "out.npz",
      f"--hf_checkpoint={checkpoint}",
      f"--token_ids={path}",
    )
  assert f"--token_ids={path}" in str(error.value)
  assert not (tmp_path / "out.npz").exists()


def test_token_ids_may_not_be_an_archive(checkpoint, tmp_path):
  path = tmp_path / "ids.npz"
  np.savez(path, ids=np.zeros((1, 2), np.int32))
  with pytest.raises(ValueError, match="is an archive"):
    run(
      f"--hf_checkpoint={checkpoint}",
      f"--token_ids={path}",
      f"--output={tmp_path / 'out.npz'}",
    )


def test_flags_that_are_missing_or_contradict(checkpoint, token_path, tmp_path):
  ids, output = f"--token_ids={token_path}", f"--output={tmp_path / 'o.npz'}"
  hf = f"--hf_checkpoint={checkpoint}"
  with pytest.raises(ValueError, match="--token_ids is missing"):
    run(hf, output)
  with pytest.raises(ValueError, match="--output is missing"):
    run(hf, ids)
  with pytest.raises(ValueError, match="one of --hf_checkpoint and --check"):
    run(ids, output)
  with pytest.raises(ValueError, match="one of --hf_checkpoint and --check"):
    run(hf, f"--checkpoint={tmp_path}", ids, output)


def test_a_checkpoint_without_mtp(token_path, tmp_path):
  model = models.tiny_model(num_layers=1, num_mtp_layers=0)
  weights.save_hf(model, tmp_path / "hf", dtype=jnp.float32)
  with pytest.raises(ValueError, match="--mtp: the checkpoint has no MTP"):
    run(
      f"--hf_checkpoint={tmp_path / 'hf'}",
      f"--token_ids={token_path}",
      f"--output={tmp_path / 'out.npz'}",
      "--mtp",
    )


def test_a_mistake_is_one_line_and_exit_code_1(token_path, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.score"),
      f"--hf_checkpoint={tmp_path / 'nowhere'}",
      f"--token_ids={token_path}",
      f"--output={tmp_path / 'out.npz'}",
    ],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert "nowhere" in line
