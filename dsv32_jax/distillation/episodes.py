"""A specialist's episodes in environments, each with its verdict.

What is kept is a whole conversation; fine-tuning learns the model's own tokens
of it, and not what tools said.
"""

import dataclasses

from dsv32_jax.agents import cold_start
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import sampling
from dsv32_jax.generation import engine as engines
from dsv32_jax.model import config as model_config
from dsv32_jax.rl import environments
from dsv32_jax.rl import episodes


def sample(
  specialist: config_lib.SpecialistConfig,
  config: config_lib.DistillConfig,
  tokenizer: tokenizers.Tokenizer,
  engine: engines.Engine,
  model: model_config.ModelConfig,
) -> list[sampling.Sample]:
  """Plays and judges every episode of a specialist.

  An example earns the whole reward, has no wrong call, and thinks or does not
  as its mode says. The same config gives the same episodes.

  Args:
    specialist: whose engine it is.
    config: of the distillation.
    tokenizer: of the specialist.
    engine: of its model.
    model: shape of its model.

  Raises:
    ValueError: if an environment has too few different tasks.
  """
  asked = [
    (dataclasses.replace(task, thinking=specialist.thinking), number, episode)
    for number, task in enumerate(tasks_of(specialist, config.seed))
    for episode in range(config.answers)
  ]
  banned = episodes.banned_ids(model, tokenizer)
  drawn = [
    dataclasses.replace(
      config.parameters(
        seed=sampling.seed_of(config.seed, specialist.name, *numbers)
      ),
      banned_ids=banned,
    )
    for _, *numbers in asked
  ]
  played = episodes.play_all(
    engine, tokenizer, specialist.episodes, [task for task, *_ in asked], drawn
  )
  return [
    _judged(specialist, *one, episode.result)
    for one, episode in zip(asked, played)
  ]


def tasks_of(
  specialist: config_lib.SpecialistConfig, seed: int
) -> list[environments.EpisodeTask]:
  """Different tasks of the training split, each environment's in turn.

  Raises:
    ValueError: if an environment has not as many.
  """
  given = specialist.episodes.environments
  drawn = environments.Tasks(given, split="train", seed=seed)
  found = drawn.different(specialist.problems)
  if len(found) < len(given) * specialist.problems:
    raise ValueError(
      f"{specialist.name}: its {len(given)} environments have {len(found)}"
      f" tasks, not {specialist.problems} each"
    )
  return found


def _judged(specialist, task, number, episode, result) -> sampling.Sample:
  thinks = specialist.thinking
  mode = cold_start.REASONING_WITH_TOOLS if thinks else cold_start.TOOL_USE
  return sampling.Sample(
    id=f"{specialist.name}-{number}-{episode}",
    specialist=specialist.name,
    task=task.domain,
    problem=task.id,
    thinking=thinks,
    num_tokens=result.num_written_tokens,
    reason=cold_start.reason_against(result.row(), mode, 1.0),
    messages=result.messages,
  )
