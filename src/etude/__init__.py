"""etude: every canonical method of deep learning as one short file, readable, proved and fast.

Importing this package does not import torch; `run`, `load` and the methods do when they are used.
"""

__version__ = "0.1.0"
