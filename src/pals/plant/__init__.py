"""The simulated world beneath NVML and vLLM; imports core alone, so it can judge the models."""
