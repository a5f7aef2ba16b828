"""Does it hold on *your* machine? Time, memory and accuracy, side by side, from one command.

Read the files in this order and you follow a figure from its shape to the README:
`shapes`, `suites` (what is measured) → `problem` (its tensors) → `methods`, with `naive`, `peers`
(who computes it) → `truth` (is the answer right?) → `session`, `pilot` (so who is measured, how
large, and how often in the time there is) → `speed`, `memory`,
`accuracy` (the figures) → `targets` (which promises hold) → `machine`, `record` (JSON) → `tables`,
`plots`, `report`, `readme` (what a person reads); `cli` runs them. Whole training steps have models
instead of tensors: `vlm` → `step`. `test_operators` is for pytest-benchmark: one small benchmark an
operator, to compare two commits with.

Left out: several GPUs.
"""
