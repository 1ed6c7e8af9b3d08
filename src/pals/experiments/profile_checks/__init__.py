"""What `pals profile evaluate` prints: fitted profiles and their rivals on the same rows, simulated and measured."""
