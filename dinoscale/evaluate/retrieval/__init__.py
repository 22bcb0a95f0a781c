"""Image retrieval: by class, of landmarks, of copies."""
