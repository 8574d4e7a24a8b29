"""The engine's greedy answers against generate of Hugging Face transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv32_jax import weights
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from experiments import transformers_peer

pytestmark = pytest.mark.parity


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_greedy_answers(oracle_folder, tmp_path):
  # Eight index heads: selections have hardly a tie.
  model = weights.load_hf(oracle_folder / "tiny_bf16")
  weights.save_hf(model, tmp_path / "float32", dtype=jnp.float32)
  peer = transformers_peer.load(tmp_path / "float32")
  peer.generation_config.eos_token_id = None
  engine = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(
      max_batch=2, page_size=8, num_pages=24, prefill_chunk=16, max_length=64
    ),
  )
  generator = np.random.default_rng(0)
  # Up to several times top-k, and beyond YaRN's original length of 32.
  prompts = [
    generator.integers(2, model.config.vocab_size, length).tolist()
    for length in (1, 19, 40)
  ]
  greedy = [
    requests.Request(
      prompt_ids=ids,
      sampling=requests.SamplingParameters(
        max_tokens=64 - len(ids), temperature=0
      ),
    )
    for ids in prompts
  ]
  for ids, done in zip(prompts, engine.generate(greedy), strict=True):
    theirs = peer.generate(
      torch.tensor([ids]),
      attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
      do_sample=False,
      max_new_tokens=64 - len(ids),
      pad_token_id=0,
    )
    assert list(done.token_ids) == theirs[0, len(ids) :].tolist()
