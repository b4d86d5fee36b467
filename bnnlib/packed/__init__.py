"""Networks of packed words: folded, computed, kept in files."""
