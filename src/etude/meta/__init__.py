"""Learning to learn: networks that adapt to a new task from a handful of examples."""
