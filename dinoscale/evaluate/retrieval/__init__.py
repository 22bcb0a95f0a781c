"""Finding images by images: classes, landmarks, copies."""
