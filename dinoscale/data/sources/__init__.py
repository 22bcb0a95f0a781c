"""Where images come from: folders, lists, videos, mixtures, synthetic sets; what is left out."""
