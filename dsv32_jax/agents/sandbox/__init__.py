"""Runs what a model wrote: bounded, alone, and with no way out.

`probe()` finds out what this machine offers; its `require()` gives a backend
or raises. `Sandbox(backend).run(argv)` runs one command; `Worker` keeps one
process that answers calls. Which bound holds the memory of a whole run is told
by `probe().memory_bound`.
"""

from dsv32_jax.agents.sandbox.limits import Limits
from dsv32_jax.agents.sandbox.limits import Result
from dsv32_jax.agents.sandbox.limits import SandboxError
from dsv32_jax.agents.sandbox.probing import Probe
from dsv32_jax.agents.sandbox.probing import probe
from dsv32_jax.agents.sandbox.run import Sandbox
from dsv32_jax.agents.sandbox.worker import Reply
from dsv32_jax.agents.sandbox.worker import Worker

__all__ = [
  "Limits",
  "Probe",
  "Reply",
  "Result",
  "Sandbox",
  "SandboxError",
  "Worker",
  "probe",
]
