"""What a load or an attended step will cost, what was decided, and what it did cost."""
