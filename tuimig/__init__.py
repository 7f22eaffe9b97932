"""tuimig clones or moves a running Linux process with milliseconds of stop."""

__version__ = "0.1.0"
