"""Protocols that the claims of several systems share, each with its baselines."""
