"""The two kinds of bank and what they are made of."""
