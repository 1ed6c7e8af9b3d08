"""A `libnvidia-ml.so.1` over emulated boards, in C, for tools that know nothing of PALS; built on demand by `build`."""
