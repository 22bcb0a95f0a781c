"""Images in tar shards: read at any place, or from front to back."""
