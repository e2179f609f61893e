"""Probes of the state."""
