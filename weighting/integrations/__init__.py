"""Weights in other trainers; a host is imported by the file of its name alone."""
