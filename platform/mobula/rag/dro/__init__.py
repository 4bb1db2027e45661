"""Direct retrieval-augmented optimisation: a selector of passages and a generator of answers learn together by EM."""
