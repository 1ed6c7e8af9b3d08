"""What every part speaks: quantities, protocols and errors; pure, imports nothing of PALS."""
