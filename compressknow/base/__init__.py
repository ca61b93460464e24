"""What all rooms stand on: errors, files, reading, registries, formats, progress."""
