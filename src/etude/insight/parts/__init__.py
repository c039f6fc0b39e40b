"""What the methods of this room share: what a map is worth, and nulls to hold it against."""
