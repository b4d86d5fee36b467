"""What takes too long for a test: faults on purpose, at length."""
