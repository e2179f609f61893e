"""Probes of the arguments."""
