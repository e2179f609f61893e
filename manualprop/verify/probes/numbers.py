"""Probes of the numbers."""
