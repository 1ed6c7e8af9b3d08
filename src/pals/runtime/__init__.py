"""The running system: tick, loop, journal, config, shared-memory channel and budget sources."""
