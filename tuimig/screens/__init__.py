"""One file a screen, named by its task."""
