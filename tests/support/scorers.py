"""Scorers of answers that a fresh model can earn something from, for tests."""

import os
import time
import zlib

from dsv32_jax.verifiers import reward


def by_text(answer: reward.Answer, config: reward.RewardConfig):
  """A reward that a fresh model's answers differ in."""
  del config
  number = zlib.crc32(answer.response.encode()) % 4 / 4
  return reward.Reward(value=number, outcome=float(number > 0.5))


def unruly(answer: reward.Answer, config: reward.RewardConfig):
  """Crashes, hangs, raises, returns nonsense or works, by the answer."""
  kind = answer.num_tokens % 6
  if kind == 0:
    os._exit(3)
  if kind == 1:
    time.sleep(600)
  if kind == 2:
    raise RuntimeError("no mood")
  if kind == 3:
    return reward.Reward(value=float("nan"), outcome=0.0)
  if kind == 4:
    return "much"
  return by_text(answer, config)
