"""The pure core: identity, page table, leases and eviction, with no I/O, no clock and no framework."""
