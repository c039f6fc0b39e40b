"""Generative adversarial networks: two players, one objective."""
