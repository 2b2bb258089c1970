"""Movement of pages between tiers."""
