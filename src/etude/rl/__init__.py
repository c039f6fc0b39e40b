"""Reinforcement learning: act in a world, learn from what came of it."""
