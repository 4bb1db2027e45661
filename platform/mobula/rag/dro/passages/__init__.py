"""DRO on real questions with two small networks: a pointer over passage vectors, and a reader that scores spans."""
