"""The Transformer: the network, and the loop that trains it."""

from etude.sequence.transformer.network import Architecture, Transformer

__all__ = ["Architecture", "Transformer"]
