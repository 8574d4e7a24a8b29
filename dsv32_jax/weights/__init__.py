"""Hugging Face checkpoints in and out, block-scaled float8 included."""

from dsv32_jax.weights.export import save_hf
from dsv32_jax.weights.folder import Staged
from dsv32_jax.weights.folder import check_target
from dsv32_jax.weights.load import abstract_hf
from dsv32_jax.weights.load import load_hf
