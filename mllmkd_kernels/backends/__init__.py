"""Who does the arithmetic? One module a backend, each with the same functions and the same argument
order.

``distill_rows``, ``logprob_rows``, ``logprob_grad``, ``relation_stats`` and ``relation_grad`` are
the whole interface; the operators call them and know nothing else of a backend. `eager` documents
them.
"""
