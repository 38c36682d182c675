"""From files on disk to batches: records, checks, buckets, pixels, caches."""
