"""Hugging Face transformers' `deepseek_v32` on CPU: what others are held to.

Runs nothing of this project, so that its memory and time are its own.
"""

import numpy as np
import torch
import transformers

from experiments import stopwatch

# L layers, B batch, T tokens, V vocabulary


def load(path, *, attention: str = "eager", experts: str = "eager"):
  """Loads a checkpoint in float32, whatever it is stored in.

  Args:
    path: Hugging Face folder.
    attention: `eager` or `sdpa`.
    experts: `eager`, `batched_mm` or `grouped_mm`, the last of which needs
      widths that are multiples of 4.
  """
  model = transformers.DeepseekV32ForCausalLM.from_pretrained(
    path,
    dtype=torch.float32,
    attn_implementation=attention,
    experts_implementation=experts,
  )
  # Beside dequantised float8 weights the others may stay bfloat16.
  return model.float().eval()


def forward(model, tokens_BT: np.ndarray):
  """Returns logits_BTV and the selections bool [L,B,T,T], causality applied."""
  indices = []
  hooks = [
    layer.self_attn.indexer.register_forward_hook(
      lambda module, args, output: indices.append(output.numpy())
    )
    for layer in model.model.layers
  ]
  with torch.no_grad():
    logits_BTV = model(_tensor(tokens_BT), use_cache=False).logits
  for hook in hooks:
    hook.remove()
  length = tokens_BT.shape[1]
  mask_LBTT = np.zeros((len(indices), *tokens_BT.shape, length), bool)
  np.put_along_axis(mask_LBTT, np.stack(indices), True, axis=-1)
  return logits_BTV.numpy(), mask_LBTT & np.tri(length, dtype=bool)


def measure(row, path, token_ids: np.ndarray) -> dict:
  """Times one row of the benchmark.

  Args:
    row: mapping with `job`, `variant` (attention and experts, joined by a
      slash) and `length`.
    path: Hugging Face folder.
    token_ids: int [1, length + tokens to decode].
  """
  torch.set_num_threads(row["threads"])
  attention, experts = row["variant"].split("/")
  model = load(path, attention=attention, experts=experts)
  jobs = {"prefill": _prefill, "train": _train, "decode": _decode}
  return jobs[row["job"]](model, token_ids, row["length"])


def _tensor(tokens_BT):
  return torch.from_numpy(np.asarray(tokens_BT)).long()


def _prefill(model, token_ids, length):
  tokens = _tensor(token_ids[:, :length])

  def run():
    with torch.no_grad():
      return model(tokens, use_cache=False).logits

  return stopwatch.measure(run)


def _train(model, token_ids, length):
  tokens = _tensor(token_ids[:, :length])
  model.train()

  def run():
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()

  return stopwatch.measure(run)


def _decode(model, token_ids, length):
  with torch.no_grad():
    cache = model(
      _tensor(token_ids[:, :length]), use_cache=True, logits_to_keep=1
    ).past_key_values
    steps = iter(range(length, token_ids.shape[1]))

    def run():
      i = next(steps)
      tokens = _tensor(token_ids[:, i : i + 1])
      return model(tokens, past_key_values=cache, use_cache=True).logits

    return stopwatch.measure(run, runs=token_ids.shape[1] - length - 1)


def measure_step(row, path) -> dict:
  """Times a decoding step of a batch behind a cache of random numbers.

  Args:
    row: mapping with `variant`, `batch`, `length` and `threads`.
    path: Hugging Face folder.
  """
  torch.set_num_threads(row["threads"])
  attention, experts = row["variant"].split("/")
  model = load(path, attention=attention, experts=experts)
  config, batch, length = model.config, row["batch"], row["length"]
  cache = transformers.DynamicCache(config=config)
  generator = torch.Generator().manual_seed(0)

  def random(*shape):
    return torch.randn(shape, generator=generator)

  for layer in range(config.num_hidden_layers):
    cache.update(
      random(batch, 1, length, config.kv_lora_rank),
      random(batch, 1, length, config.qk_rope_head_dim),
      layer,
    )
    cache.update_indexer(random(batch, length, config.index_head_dim), layer)
  tokens = torch.zeros((batch, 1), dtype=torch.long)

  def run():
    with torch.no_grad():
      return model(tokens, past_key_values=cache, use_cache=True).logits

  return stopwatch.measure(run, runs=8)
