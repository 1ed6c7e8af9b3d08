"""The plant against public measurements: what was measured, what the plant says, and the split between fit and test."""
