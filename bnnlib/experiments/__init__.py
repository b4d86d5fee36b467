"""An experiment as data: the nine of the original, their variants and lengths, what to build."""
