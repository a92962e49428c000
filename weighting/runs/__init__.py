"""What runs leave behind, read again."""
