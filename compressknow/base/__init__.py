"""Errors, files, reading, registries, formats and progress, which every other package here may import."""
