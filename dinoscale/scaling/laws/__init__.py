"""Laws fitted to the results of a sweep."""
