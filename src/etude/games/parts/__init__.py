"""What the methods of this room share: rules of games, their flattened trees, strategies and how they are shown."""
