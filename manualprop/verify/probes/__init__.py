"""The probes, by family."""
