"""What every public call does first: read its arguments, take its turn, and open files that came from others."""
