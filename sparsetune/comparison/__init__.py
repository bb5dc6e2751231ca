"""What may be concluded: confirmed winners, statistics, the rules of a fair ranking."""
