"""Reinforcement learning: objective, replay batches and learner."""
