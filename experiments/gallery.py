"""Makes a page that replays episodes message by message.

python -m experiments.gallery --episodes=FILE.jsonl --output=FILE.html

The file holds rows of `agents.many` or the trajectories of a synthesis
(docs/agent_data.md). The page stands alone: no network, no other file. Arrow
keys and a slider step through an episode; FILE.html#2.5 opens the second one
at its fifth message.
"""

import os
import pathlib

from absl import flags

from experiments import common
from experiments import gallery_page

_EPISODES = flags.DEFINE_string(
  "episodes", None, "JSONL of episodes or trajectories.", required=True
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Page to write, .html.", required=True
)
_FIRST = flags.DEFINE_integer(
  "first", 100, "Episodes to show, from the top.", lower_bound=1
)


def main(argv):
  del argv
  episodes = gallery_page.read(pathlib.Path(_EPISODES.value), _FIRST.value)
  common.require_writable("output", _OUTPUT.value)
  output = pathlib.Path(_OUTPUT.value)
  partial = output.with_name(output.name + ".partial")
  partial.write_text(gallery_page.page(episodes), encoding="utf-8")
  os.replace(partial, output)
  print(f"{len(episodes)} episodes: {output}")


if __name__ == "__main__":
  common.run(main)
