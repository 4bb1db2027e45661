"""DRO in a world of generated facts, with every order enumerated."""
