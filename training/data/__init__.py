"""From files on disk to padded batches: records → samples → token ids and labels → batches."""
