"""Experiments on the simulated plant: what is run, how it is measured, what was promised, and whether it was reached."""
