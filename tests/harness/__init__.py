"""What the tests on real processes share: starting and asking targets, running the command, finding leftovers."""
