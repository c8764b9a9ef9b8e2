"""Scenarios: the TOML files that say what is simulated, and what must hold."""
