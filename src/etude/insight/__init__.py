"""What a trained network looks at: maps of its input, and how far to trust them."""
