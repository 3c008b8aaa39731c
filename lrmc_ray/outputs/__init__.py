"""What lies in an output directory, and what of it can go."""
