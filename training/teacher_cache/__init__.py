"""Can the teacher run once, and not in every epoch of every experiment?

`python -m training cache` runs the frozen teacher over the data of a distilled stage and stores
what the losses need of it; `python -m training run` with the same `teacher_cache.path` then trains
without loading the teacher at all.

Stored are the last hidden states (before the head, after the final norm) of the rows that the
losses select, and the head once. That is exact: every divergence, temperature, weight and the
relation loss can be chosen after the fact, and what is lost is the rounding to the stored dtype,
which is nothing where the teacher itself computes in it. The k largest logits of a row would be
smaller (388 bytes in place of 5,120 at D = 2560 and k = 64), but KL over the rest becomes one
number, and the relation loss, which compares all V logits of each image row, cannot be had.

Visual rows are most of it: 729 an image with SigLIP at 384 pixels, 3.7 MB a sample or 2.1 TB for
LLaVA's 558,000 captions, where the response rows are some 30 and 0.1 TB. `teacher_cache.visual =
false` stores the response rows alone, for losses without visual terms.

    store       shards, head and manifest on disk; rows found by sample
    fill        the pass: cost first, then shard by shard, resumable
    use         the stored rows as a teacher
"""
