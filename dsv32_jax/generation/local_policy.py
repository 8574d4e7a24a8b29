"""The engine as the policy of agents: many episodes share its batch."""

import dataclasses

import numpy as np

from dsv32_jax.agents import policy as policies
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import answers
from dsv32_jax.generation.server import runner as runners


def local_policy(
  runner: runners.Runner,
  tokenizer: tokenizers.Tokenizer,
  sampling: requests.SamplingParameters,
  *,
  want_selection: bool = False,
  want_routing: bool = False,
) -> policies.TokenPolicy:
  """Makes a policy that asks the runner's engine.

  With a seed, each reply draws from a seed of its own that follows from it: an
  episode with a policy of its own then goes the same way whatever else runs.

  Args:
    runner: of an engine with this tokenizer's eos, and room for as many
      requests as there are episodes at a time.
    tokenizer: of the model.
    sampling: how to draw; max_tokens bounds each reply besides the episode's
      own limit. Ids that the tokenizer lacks have to be banned.
    want_selection: record the keys that every token attended to.
    want_routing: record the experts that every token went through.

  Returns:
    A policy whose completions have `requests.Completion` as record. Cancelling
    a reply frees its pages. It raises ValueError where a conversation is too
    long for the engine, and what `answers.complete` raises.
  """
  seeds = None
  if sampling.seed is not None:
    seeds = np.random.default_rng(sampling.seed)

  async def sample(prompt_ids, max_tokens):
    changes = {"max_tokens": min(max_tokens, sampling.max_tokens)}
    if seeds is not None:
      changes["seed"] = int(seeds.integers(1 << 63))
    request = requests.Request(
      prompt_ids=prompt_ids,
      sampling=dataclasses.replace(sampling, **changes),
      want_selection=want_selection,
      want_routing=want_routing,
    )
    return await answers.complete(runner, request)

  return policies.TokenPolicy(tokenizer, sample)
