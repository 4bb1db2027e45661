"""DRO on real questions with language models: a list-wise selector and a generator, each under adapters of its own."""
