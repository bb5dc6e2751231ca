"""What is searched: settings and their words, search spaces, the members of a sweep."""
