"""What `weighting train`, mix, compare, score and tokens do once the spec has been read."""
