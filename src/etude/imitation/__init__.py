"""Learning to act from an expert: cloning what it did, and asking it about what the learner sees."""
