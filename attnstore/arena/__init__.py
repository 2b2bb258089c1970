"""Page slots: preallocated memory of a fixed capacity that holds the pages' bytes."""
