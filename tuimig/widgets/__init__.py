"""What screens share: each draws one thing from plain values and sends messages up."""
