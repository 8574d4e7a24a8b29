"""A program as small as can be: builds its config and prints it.

`python -m tests.support.echo_program --config=tests/support/echo_program.py`;
with --config.action=NAME it fails in the way that NAME says.
"""

import dataclasses
import json
import sys

from absl import flags
from absl import logging
import numpy as np

from dsv32_jax import config_files
from experiments import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  rate: float = 0.5
  limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EchoConfig:
  action: str = "print"
  steps: int = 3
  source: str | None = None
  part: Part = Part()
  parts: tuple[Part, ...] = (Part(), Part(rate=1.5))

  def __post_init__(self):
    if self.steps < 0:
      raise ValueError(f"steps={self.steps} must not be negative")


def get_config(variant: str = "short"):
  return common.config_variant(
    {"short": EchoConfig, "long": lambda: EchoConfig(steps=1000)}, variant
  )


def main(argv):
  del argv
  config = config_files.build(EchoConfig, flags.FLAGS.config)
  common.require_workdir()
  logging.warning("a library's chatter")
  actions = {
    "print": lambda: sys.stdout.write(json.dumps(config_files.dump(config))),
    "open": lambda: np.load("/no/such/file"),
    "library": lambda: np.zeros(3).reshape(2, 2),
    "bug": lambda: 1 / 0,
  }
  actions[config.action]()


if __name__ == "__main__":
  common.define_common_flags()
  common.run(main)
