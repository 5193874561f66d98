"""Passes of Acme."""
