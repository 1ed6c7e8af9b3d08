"""PALS: a power-aware runtime for LLM serving; importing it does no work and needs no GPU, vLLM or NVML."""

__version__ = "0.1.0"
