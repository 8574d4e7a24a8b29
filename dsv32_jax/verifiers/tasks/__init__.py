"""Generated problems whose answers can be checked: no data set needed."""

from dsv32_jax.verifiers.tasks.arithmetic import Arithmetic
from dsv32_jax.verifiers.tasks.brackets import Brackets
from dsv32_jax.verifiers.tasks.instructions import Instructions
from dsv32_jax.verifiers.tasks.knights import Knights
from dsv32_jax.verifiers.tasks.mixture import Mixture
from dsv32_jax.verifiers.tasks.mixture import TaskConfig
from dsv32_jax.verifiers.tasks.problem import Problem
from dsv32_jax.verifiers.tasks.problem import generate
from dsv32_jax.verifiers.tasks.programs import Programs
from dsv32_jax.verifiers.tasks.proofs import Proofs
from dsv32_jax.verifiers.tasks.sorting import Sorting
