"""One program a job: `python -m experiments.NAME --config=configs/FILE.py`."""

import os

# XLA's C++ log keeps its warnings and drops what is merely informative. It is
# read when jax is first imported, which every program does after this file.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
