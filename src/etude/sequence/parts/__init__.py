"""What several methods of this room share."""
