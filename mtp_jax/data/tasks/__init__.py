"""Synthetic tasks as data sources: a prompt, an answer, and an exact score.

One file a task; `corpus.py` turns any of them into rows and batches. Tokens are words
that white space separates (`tokenizers.SymbolTokenizer`).
"""
