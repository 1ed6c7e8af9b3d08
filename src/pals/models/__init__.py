"""Profiles: what an engine on a board does at each operating point; pure."""
