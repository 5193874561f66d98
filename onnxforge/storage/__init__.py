"""Bytes of models on disk: reading, placing, writing, publishing."""
