"""The wire: generated stubs (behind this package only), codecs, and the mapping of errors to statuses."""
