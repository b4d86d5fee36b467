"""What many runs say together: capacity in bits, and the claims of the book."""
