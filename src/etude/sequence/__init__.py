"""Networks that read and write sequences, one step after the other."""
