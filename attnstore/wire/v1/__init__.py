"""Generated from proto/attnstore/v1 by `make proto`; do not edit. Only `attnstore.wire` imports it."""
