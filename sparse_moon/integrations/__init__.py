"""Sparse training in other frameworks' loops: :mod:`.lightning` and :mod:`.transformers`.

A module is imported by whoever uses its framework; nothing else imports it.
"""
