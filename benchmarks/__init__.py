"""Measurements, as opposed to tests: nothing here passes or fails."""
