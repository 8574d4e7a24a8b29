"""Runs GRPO side by side and notes what is learned, until done or killed.

Run as `python -m tests.support.rl_until_killed FOLDER`. Each line that it adds
to FOLDER/learned.jsonl holds the version before a rollout was learned, that of
the sampler, and the tokens of the prompts.
"""

import json
import pathlib
import sys

from dsv32_jax.rl import loop
from dsv32_jax.rl import policy as policy_lib
from tests.support import rl_runs
from tests.support import scorers

ROLLOUTS, STALENESS = 6, 2


def config():
  return rl_runs.config(
    rollouts=ROLLOUTS, max_staleness=STALENESS, evaluation=None
  )


def main():
  folder = pathlib.Path(sys.argv[1])
  folder.mkdir(exist_ok=True)
  learn = policy_lib.Policy.learn

  def noted(self, rollout):
    firsts = [group[0].parts[0] for group in rollout.groups]
    prompts = [one.token_ids_N[~one.written_N].tolist() for one in firsts]
    with open(folder / "learned.jsonl", "a", encoding="utf-8") as file:
      row = [self.version, rollout.version, prompts]
      file.write(json.dumps(row) + "\n")
    return learn(self, rollout)

  policy_lib.Policy.learn = noted
  loop.train(config(), str(folder), scorer=scorers.by_text)


if __name__ == "__main__":
  main()
