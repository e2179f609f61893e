"""Probes of the routes."""
