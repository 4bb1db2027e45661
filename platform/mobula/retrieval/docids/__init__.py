"""Document identifiers: families of code spaces, the table of a corpus, and what decoding needs from both."""
