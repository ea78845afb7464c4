"""Harnesses and trainers of others, one file each: each imports its package, and is imported by who uses it alone."""
