"""What a train step takes on accelerators that are not there."""
