"""What `search` says of the smallest checkpoint that keeps a share of the knowledge."""
