"""Checkpoints in and out: Hugging Face, float8 included, and Orbax."""

from dsv32_jax.weights.export import save_hf
from dsv32_jax.weights.folder import check_target
from dsv32_jax.weights.load import abstract_hf
from dsv32_jax.weights.load import load_hf
from dsv32_jax.weights.orbax import load_orbax
from dsv32_jax.weights.orbax import model_notes
from dsv32_jax.weights.orbax import save_orbax
