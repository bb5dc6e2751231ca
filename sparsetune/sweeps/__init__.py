"""Running a search: begin, go on, extend, record, and say how it stands."""
