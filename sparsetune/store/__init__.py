"""What must not be lost: journals, their lines and locks, and the paths they lie at."""
