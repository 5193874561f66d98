"""The built-in passes: one module, one pass, one name."""
