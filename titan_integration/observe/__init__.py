"""What a run reports and writes down."""
