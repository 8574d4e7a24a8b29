"""The whole recipe on the standard library's source text.

python -m experiments.quickstart --workdir=DIR

Variants: full (the default; about ten minutes on two CPU cores), smoke.
"""

from dsv32_jax.recipe import sizes
from experiments import common


def get_config(variant: str = "full"):
  return common.config_variant(
    {"full": sizes.full, "smoke": sizes.smoke}, variant
  )
