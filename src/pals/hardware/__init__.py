"""Boards, real or emulated, through one NVML adapter."""
