"""Policies, the estimator and the guard; pure functions of samples."""
