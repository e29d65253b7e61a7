"""Synthetic tasks as data sources: a prompt, an answer, and an exact score.

Each task has a file; `corpus.py` packs examples of any task into rows and batches.
Tokens are words separated by white space (`tokenizers.SymbolTokenizer`).
"""
