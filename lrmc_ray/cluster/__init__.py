"""Ray sessions, what fits on the machines, and checks before anything is paid for."""
