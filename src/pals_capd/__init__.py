"""capd: the only process with privilege; it holds boards at leased power limits and clocks, and puts them back when a lease ends.

Standard library and nvidia-ml-py only. `ledger` decides and does nothing; `keeper` does what it says, record and audit first.
"""

__version__ = "0.1.0"
