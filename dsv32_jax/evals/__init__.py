"""Scoring, held-out loss, attention mass: what a model is worth."""
