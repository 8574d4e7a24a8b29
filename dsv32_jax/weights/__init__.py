"""Hugging Face checkpoints in and out, block-scaled float8 included."""
