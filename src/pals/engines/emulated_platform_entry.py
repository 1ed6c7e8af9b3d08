"""Entry point of `vllm.platform_plugins`: the emulated platform, only where PALS_EMU is set; a real GPU is never hidden."""

from __future__ import annotations

import os


def platform_class() -> str | None:
    """Dotted path of the platform class, or None to leave vLLM's own choice."""
    return "pals.engines.emulated_platform.EmulatedPlatform" if os.environ.get("PALS_EMU") else None
