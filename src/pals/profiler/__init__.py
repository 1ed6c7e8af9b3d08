"""Which operating points to visit, visiting them, and writing rows."""
