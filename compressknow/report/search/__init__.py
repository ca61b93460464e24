"""What `search` says of the cheapest checkpoint that keeps what was asked for."""
