"""Probes of the sizes."""
