"""What only the methods of this room share."""
