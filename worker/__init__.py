"""The GPU or CPU worker: runs models over paged KV memory and keeps cold pages in the store."""
