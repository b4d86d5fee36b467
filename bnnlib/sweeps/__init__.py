"""Many runs: a grid of experiments, and the workers that make them, on one machine or on many."""
