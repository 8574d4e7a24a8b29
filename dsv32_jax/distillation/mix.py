"""Accepted answers of all specialists, chosen and mixed by weight."""

from collections.abc import Sequence
import math
import random

from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import sampling


def choose(
  samples: Sequence[sampling.Sample], most_of_a_problem: int
) -> tuple[list[sampling.Sample], list[tuple[str, str]]]:
  """Keeps the shortest accepted answers of each problem, no text twice.

  Returns:
    Samples in their order, and (id, reason) of the others.
  """
  kept, left_out, counts, seen = set(), [], {}, set()
  for one in sorted(samples, key=lambda one: (one.num_tokens, one.id)):
    key = (one.specialist, one.task, one.problem)
    answer = (*key, str(one.messages))
    reason = one.reason
    if not reason and answer in seen:
      reason = "it is there already"
    elif not reason and counts.get(key, 0) >= most_of_a_problem:
      reason = "there are enough of its problem"
    if reason:
      left_out.append((one.id, reason))
      continue
    seen.add(answer)
    counts[key] = counts.get(key, 0) + 1
    kept.add(one.id)
  return [one for one in samples if one.id in kept], left_out


def mix(
  chosen: Sequence[sampling.Sample], config: config_lib.DistillConfig
) -> list[sampling.Sample]:
  """Takes from each specialist in proportion to its weight, and shuffles.

  Where one has too few, the whole mixture shrinks; its proportions stay.

  Args:
    chosen: of all specialists.
    config: weights, number of examples, seed.

  Raises:
    ValueError: naming a specialist of whose answers none was accepted, or with
      config.everything none of any.
  """
  generator = random.Random(config.seed)
  if config.everything:
    if not chosen:
      raise ValueError("no answer of any specialist was accepted")
    return generator.sample(chosen, len(chosen))
  parts = {
    one.name: [s for s in chosen if s.specialist == one.name]
    for one in config.specialists
  }
  for name, part in parts.items():
    if not part:
      raise ValueError(f"no answer of specialist {name!r} was accepted")
  total = sum(one.weight for one in config.specialists)
  wanted = math.inf if config.examples is None else config.examples
  for one in config.specialists:
    wanted = min(wanted, len(parts[one.name]) * total / one.weight)
  mixed = []
  for one in config.specialists:
    count = max(1, round(wanted * one.weight / total))
    mixed += generator.sample(parts[one.name], count)
  generator.shuffle(mixed)
  return mixed
