"""Distils specialists: their answers, rejected by verifiers, as one data set.

python -m experiments.distill --config=configs/distill.py --workdir=DIR

sft.jsonl is for fine-tuning: a source of kind "jsonl" with pieces_field
"pieces". rejections.jsonl tells why each other answer is not in it, report.json
counts both. A specialist whose samples are there already is not asked again.
"""

import dataclasses
import json
import pathlib
import time

from absl import flags
import tqdm

from dsv32_jax import config_files
from dsv32_jax.agents import cold_start
from dsv32_jax.agents import tables
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import mix
from dsv32_jax.distillation import sampling
from dsv32_jax.generation import engine as engines
from dsv32_jax.training import loop
from dsv32_jax.training import model_checkpoint
from dsv32_jax.verifiers import reward
from experiments import common

common.define_common_flags()
# They decide about samples that are there already, not about their drawing.
_MAY_CHANGE = frozenset(
  {"most_of_a_problem", "examples", "scoring_workers", "scoring_seconds"}
)


def main(argv):
  del argv
  config = config_files.build(config_lib.DistillConfig, flags.FLAGS.config)
  workdir = pathlib.Path(common.require_workdir())
  loop.claim_folder(config, str(workdir), _MAY_CHANGE)
  tokenizer = tokenizers.load(config.tokenizer)
  samples = []
  for specialist in tqdm.tqdm(config.specialists, unit="specialist"):
    samples += _samples(specialist, config, tokenizer, workdir)
  chosen, left_out = mix.choose(samples, config.most_of_a_problem)
  tables.write_jsonl(
    workdir / "rejections.jsonl",
    ({"id": name, "reason": reason} for name, reason in left_out),
  )
  mixed = mix.mix(chosen, config)
  tables.write_jsonl(workdir / "sft.jsonl", map(_row, mixed))
  report = {
    one.name: _counts(one.name, samples, chosen, mixed)
    for one in config.specialists
  }
  (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  for name, counts in report.items():
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{name}: {told}")
  print(f"{workdir / 'sft.jsonl'}: {len(mixed)} examples")


def _samples(specialist, config, tokenizer, workdir) -> list[sampling.Sample]:
  """A specialist's samples: those that are there, else drawn."""
  path = workdir / f"samples-{specialist.name}.jsonl"
  if not path.exists():
    model = model_checkpoint.load_model(specialist.checkpoint)
    engine = engines.Engine(model, config.engine, eos_id=tokenizer.eos_id)
    begin = time.perf_counter()
    with reward.Rewarder(
      reward.RewardConfig(thinking=specialist.thinking),
      num_workers=config.scoring_workers,
      timeout_seconds=config.scoring_seconds,
    ) as rewarder:
      drawn = sampling.sample(
        specialist, config, tokenizer, engine.generate, rewarder
      )
    seconds = time.perf_counter() - begin
    print(f"{specialist.name}: {len(drawn)} answers in {seconds:.0f} s")
    tables.write_jsonl(path, map(dataclasses.asdict, drawn))
  return [sampling.Sample(**row) for row in tables.read_jsonl(path)]


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


if __name__ == "__main__":
  common.run(main)
