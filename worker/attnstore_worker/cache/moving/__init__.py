"""Pages on their way between tiers."""
