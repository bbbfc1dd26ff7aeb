"""S3: a client whose requests are repeated, reported and given up within a budget of time."""
