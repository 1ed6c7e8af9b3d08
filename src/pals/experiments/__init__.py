"""Replays, comparisons and the demo."""
