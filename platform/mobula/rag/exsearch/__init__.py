"""EXSEARCH: a language model learns by EM to think, search and record before it answers."""
