"""Backpropagation: our own reverse-mode engine, and a network trained with it."""

from etude.basics.backprop.engine import Node, backward

__all__ = ["Node", "backward"]
