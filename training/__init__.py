"""A thin trainer for LLaVA-style models: teacher pre-training and SFT, student DPT, SFT and DFT,
and the demo.

Read in the order of the flow: `config` (what can be set) → `data` (what is read) → `models` (what
is trained) → `stages` (which parameters, which loss terms) → `step` (one batch through both models)
→ `loop` (the trainer) → `evaluation` (what was learned). `python -m training --help` is the one
entry point.
"""
