"""The engine as a library: knows nothing of Textual, of rich or of printing."""
