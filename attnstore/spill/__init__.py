"""Pages on a disk: segments of records that verify themselves, their writer, recovery and check. `disk.SpillDisk` is the door."""
