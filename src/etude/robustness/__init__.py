"""Where classifiers break: attacks inside a ball, and what they do to confidence."""
