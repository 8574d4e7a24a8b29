"""The whole of a distillation: sample, reject, mix, write.

A folder gets `samples-NAME.jsonl` of each specialist, `rejections.jsonl`,
`sft.jsonl` and `report.json`. Samples that are there already are not drawn
again.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import tables
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import episodes
from dsv32_jax.distillation import mix
from dsv32_jax.distillation import sampling
from dsv32_jax.generation import engine as engines
from dsv32_jax.model import transformer
from dsv32_jax.verifiers import reward

SFT_FILE = "sft.jsonl"
# They decide about samples that are there already, not about their drawing.
MAY_CHANGE = frozenset(
  {
    "most_of_a_problem",
    "examples",
    "everything",
    "scoring_workers",
    "scoring_seconds",
  }
)


def distill(
  config: config_lib.DistillConfig,
  folder: pathlib.Path,
  load: Callable[[str], transformer.Transformer],
  progress: Callable = iter,
) -> dict[str, dict[str, int]]:
  """Distils specialists into a data set.

  Args:
    config: whose answers, and what is kept.
    folder: of the distillation; it exists.
    load: makes the model of a folder of checkpoints.
    progress: wraps the specialists.

  Returns:
    Counts by specialist: problems, answers, accepted, solved problems, chosen
    and mixed.

  Raises:
    ValueError: naming a specialist of whose answers none was accepted, or with
      `everything` none of any; what was drawn and why it was rejected is in the
      folder.
  """
  tokenizer = tokenizers.load(config.tokenizer)
  samples = []
  for specialist in progress(config.specialists):
    samples += _samples(specialist, config, tokenizer, folder, load)
  chosen, left_out = mix.choose(samples, config.most_of_a_problem)
  tables.write_jsonl(
    folder / "rejections.jsonl",
    ({"id": name, "reason": reason} for name, reason in left_out),
  )
  mixed = mix.mix(chosen, config)
  tables.write_jsonl(folder / SFT_FILE, map(_row, mixed))
  report = {
    one.name: _counts(one.name, samples, chosen, mixed)
    for one in config.specialists
  }
  (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  return report


def _samples(
  specialist, config, tokenizer, folder, load
) -> list[sampling.Sample]:
  """A specialist's samples: those that are there, else drawn."""
  path = folder / f"samples-{specialist.name}.jsonl"
  if not path.exists():
    model = load(specialist.checkpoint)
    engine = engines.Engine(model, config.engine, eos_id=tokenizer.eos_id)
    if specialist.episodes is not None:
      drawn = episodes.sample(
        specialist, config, tokenizer, engine, model.config
      )
    else:
      drawn = _answers(specialist, config, tokenizer, engine)
    tables.write_jsonl(path, map(dataclasses.asdict, drawn))
  return [sampling.Sample(**row) for row in tables.read_jsonl(path)]


def _answers(specialist, config, tokenizer, engine) -> list[sampling.Sample]:
  with reward.Rewarder(
    reward.RewardConfig(thinking=specialist.thinking),
    num_workers=config.scoring_workers,
    timeout_seconds=config.scoring_seconds,
  ) as rewarder:
    return sampling.sample(
      specialist, config, tokenizer, engine.generate, rewarder
    )


def _row(one: sampling.Sample) -> dict:
  mode = "thinking" if one.thinking else "chat"
  pieces = cold_start.pieces(one.messages, mode)
  return {
    "id": one.id,
    "specialist": one.specialist,
    "task": one.task,
    "messages": json.dumps(one.messages),
    "pieces": json.dumps(pieces),
  }


def _counts(name, samples, chosen, mixed) -> dict[str, int]:
  mine = [one for one in samples if one.specialist == name]
  key = lambda one: (one.task, one.problem)
  return {
    "problems": len({key(one) for one in mine}),
    "answers": len(mine),
    "accepted": sum(not one.reason for one in mine),
    "solved problems": len({key(one) for one in mine if not one.reason}),
    "chosen": sum(one.specialist == name for one in chosen),
    "mixed": sum(one.specialist == name for one in mixed),
  }
