"""Optuna's studies and Ray's scheduler, rebuilt from the journal."""
