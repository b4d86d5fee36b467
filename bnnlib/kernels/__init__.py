"""How a binary layer multiplies: its products, their precision, and a whole step as one graph."""
