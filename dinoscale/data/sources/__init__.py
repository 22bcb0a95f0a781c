"""Where images come from: folders, lists, videos, mixtures, drawn ones; what is left out."""
