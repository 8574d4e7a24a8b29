"""Optimiser, losses, stages, step, checkpoints and metrics."""
