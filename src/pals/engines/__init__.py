"""Everything that touches vLLM: the plugin, the emulated accelerator, the launcher, a client."""
