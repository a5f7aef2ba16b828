"""What did a model learn? One pass over held-out data, or answers it writes to a benchmark.

`held_out` scores a model in training; `benchmarks` names what can be asked: a reader of the
benchmark's own files (`questions`, `captions`), the words of the prompt, and a scorer (`scores`).
`run` puts the parts together and lets a saved model answer (`training.generate`); `export` hands a
model to lmms-eval.
"""
